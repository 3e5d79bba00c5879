"""Beginning with the weights of an earlier run (`model.start_from`): encoders, fusion, and the heads' rows by policy.

An encoder, or the fusion, is taken whole or not at all: one that has the same name must be the same. A row of a head
belongs to a policy and is found by the policy's name, so that a taxonomy with one more policy begins with the rows that
were trained and a fresh one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from crossguard.configs.errors import UserError
from crossguard.configs.saved import part_of
from crossguard.configs.schema.model import ModelConfig
from crossguard.data.taxonomy import Taxonomy
from crossguard.train import checkpoint_folder
from crossguard.train.checkpoint_manifest import verify
from crossguard.train.encode import PostEncoder
from crossguard.train.export.bundle import WEIGHTS, open_bundle
from crossguard.train.fragments import gathered, persistent_buffers, tensor_shapes
from crossguard.train.models import Classifier
from crossguard.train.models.embedding import FRONTS
from crossguard.train.models.heads import rows_of
from crossguard.train.ranks import Ranks
from crossguard.train.stored_weights import StoredWeights

# What may differ between two encoders of the same weights: where they are from, and how much of a post they are given.
_MAY_DIFFER = ("pretrained", "config", "build", "lora", "tokenizer", "max_length", "max_images", "max_characters")


@dataclass(frozen=True)
class Earlier:
    """A trained model, its weights still on the disk."""

    place: Path
    model: ModelConfig
    taxonomy: Taxonomy
    # Fingerprint of its tokenizer.
    tokenizer: str
    # Name -> shape of every parameter and buffer.
    shapes: Mapping[str, list[int]]
    # Name -> the tensor, whole.
    read: Callable[[str], torch.Tensor]

    @classmethod
    def open(cls, place: Path, ranks: Ranks) -> Earlier:
        """A run directory (its best checkpoint), a checkpoint or a bundle; all ranks call it.

        Raises:
            UserError: it is none of them, or a file is damaged.
        """
        if ranks.on_first(lambda: (place / WEIGHTS).is_file()):
            return cls._of_bundle(place, ranks)
        return cls._of_checkpoint(ranks.on_first(lambda: _checkpoint_at(place)), ranks)

    @classmethod
    def _of_bundle(cls, folder: Path, ranks: Ranks) -> Earlier:
        model, taxonomy, tokenizer = ranks.on_first(lambda: _described(folder))
        weights = safe_open(folder / WEIGHTS, framework="pt")
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        return cls(folder, model, taxonomy, tokenizer, shapes, weights.get_tensor)

    @classmethod
    def _of_checkpoint(cls, checkpoint: Path, ranks: Ranks) -> Earlier:
        error: UserError | None = None
        try:
            verify(checkpoint, ranks.rank, ranks.world_size)
        except UserError as damage:
            error = damage
        ranks.agree(error)
        state = checkpoint_folder.read_state(checkpoint)
        stored = StoredWeights(checkpoint)
        return cls(
            checkpoint,
            part_of(ModelConfig, state["config"]["model"], checkpoint),
            Taxonomy.from_json(state["taxonomy"]),
            state["tokenizer"],
            stored.shapes,
            stored.read,
        )


def start_from(earlier: Earlier, config: ModelConfig, model: Classifier, encode: PostEncoder, ranks: Ranks) -> str:
    """Copy what fits into a model that is not yet under DeepSpeed; all ranks call it.

    Args:
        earlier: what to begin with.
        config: of `model`.
        model: its weights are whole on every rank, or shared out by ZeRO-3.
        encode: of the posts that will be trained on.
        ranks: all of them.

    Returns:
        What was taken and what is fresh, in a line.

    Raises:
        UserError: an encoder or the fusion is another one, or reads other numbers; names the first difference.
    """
    parts = _shared_parts(earlier, config, model)
    _check_settings(earlier, config, parts)
    if "text" in parts and earlier.tokenizer != encode.tokenizer.fingerprint:
        raise _refusal(earlier, "model.text.tokenizer: its texts were cut into other tokens")
    tensors = dict(model.named_parameters()) | dict(persistent_buffers(model))
    for name, tensor in tensors.items():
        if _part(name) in parts:
            _fill(tensor, partial(earlier.read, name), ranks)
    # What another fusion says, the earlier heads do not understand.
    theirs = _rows_by_meaning(earlier) if "fusion" in parts else {}
    incomplete = set()
    for name, meanings in rows_of(config.heads, encode.taxonomy).items():
        rows = [theirs.get(meaning) for _, meaning in meanings]
        incomplete |= {policy for (policy, _), row in zip(meanings, rows, strict=True) if row is None}
        _fill(tensors[name], partial(_with_rows, tensors[name], rows, earlier), ranks)
    every = [*config.modalities, "fusion", *encode.taxonomy.names]
    taken = [*parts, *(name for name in encode.taxonomy.names if name not in incomplete)]
    fresh = [name for name in every if name not in taken]
    return f"train: begins with {earlier.place}: {', '.join(taken)}; fresh: {', '.join(fresh) or 'nothing'}"


def _described(folder: Path) -> tuple[ModelConfig, Taxonomy, str]:
    """Model, policies and tokenizer of a bundle."""
    model, encode = open_bundle(folder)
    return model, encode.taxonomy, encode.tokenizer.fingerprint


def _checkpoint_at(place: Path) -> Path:
    if (place / checkpoint_folder.STATE).is_file():
        return place
    if (place / "checkpoints").is_dir():
        return checkpoint_folder.best_or_latest(place)
    raise UserError(
        f"model.start_from={place}: neither a run directory with checkpoints, nor a checkpoint, nor a bundle"
    )


def _shared_parts(earlier: Earlier, config: ModelConfig, model: Classifier) -> list[str]:
    """The encoders that both models have, and the fusion where it joins the same modalities.

    Raises:
        UserError: a tensor of one of them is not the same in both, or there is none.
    """
    parts = [name for name in config.modalities if name in earlier.model.modalities]
    if not parts:
        raise _refusal(earlier, f"model.modalities: it looks at {', '.join(earlier.model.modalities)} only")
    if set(config.modalities) == set(earlier.model.modalities):
        parts.append("fusion")
    ours = tensor_shapes(model)
    for part in parts:
        for name in sorted(name for name in ours.keys() | earlier.shapes.keys() if _part(name) == part):
            then, now = earlier.shapes.get(name, "absent"), ours.get(name, "absent")
            if then != now:
                raise _refusal(earlier, f"'{name}' is {then} there and {now} in this configuration")
    return parts


def _part(name: str) -> str:
    """The modality that a tensor belongs to, or whatever else holds it."""
    module = name.partition(".")[0]
    return FRONTS.get(module, module)


def _check_settings(earlier: Earlier, config: ModelConfig, parts: list[str]) -> None:
    """Shapes alone show neither the number of attention heads nor what a text is prefixed with."""
    for part in parts:
        then, now = (_settings(getattr(model, part)) for model in (earlier.model, config))
        for key in sorted(then.keys() & now.keys()):
            if then[key] != now[key] and "drop" not in key:
                raise _refusal(earlier, f"model.{part}.{key} was {then[key]}, is now {now[key]}")


def _settings(part: Any) -> dict[str, Any]:
    values = asdict(part)
    described = values.get("config") or {}
    return {name: value for name, value in values.items() if name not in _MAY_DIFFER} | {
        f"config.{name}": value for name, value in described.items()
    }


def _rows_by_meaning(earlier: Earlier) -> dict[str, tuple[str, int]]:
    """What a row of the heads means -> the tensor that holds it, and which of its rows it is."""
    return {
        meaning: (name, row)
        for name, meanings in rows_of(earlier.model.heads, earlier.taxonomy).items()
        for row, (_, meaning) in enumerate(meanings)
    }


def _with_rows(fresh: torch.Tensor, rows: list[tuple[str, int] | None], earlier: Earlier) -> torch.Tensor:
    """`fresh`, with the rows that the earlier model has."""
    joined = fresh.clone()
    stored = {name: earlier.read(name) for name in {found[0] for found in rows if found is not None}}
    for number, found in enumerate(rows):
        if found is not None:
            name, row = found
            joined[number] = stored[name][row]
    return joined


def _fill(tensor: torch.Tensor, make: Callable[[], torch.Tensor], ranks: Ranks) -> None:
    """Put into a tensor what `make` gives; into one that ZeRO-3 has shared out, rank 0 does so for all."""
    with gathered(tensor, changed=True), torch.no_grad():
        if ranks.is_first or not hasattr(tensor, "ds_id"):
            tensor.copy_(make())


def _refusal(earlier: Earlier, difference: str) -> UserError:
    return UserError(f"model.start_from={earlier.place}: of another model: {difference}; use the model it was made of")
