"""What may change between a training run and its resumption."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast, get_type_hints

from crossguard.configs.errors import UserError
from crossguard.configs.schema import Config

# Keys, or groups of keys, that decide neither the samples of a step nor what is done with them. Where posts and shards
# lie may change because a run directory may be copied; their content is checked by the hash in the order's state.
MAY_CHANGE = (
    "ablations",
    "build.append",
    "build.executor",
    "build.max_errors_listed",
    "build.num_workers",
    "build.ray_address",
    "build.slurm_options",
    "checkpoint",
    "cluster",
    "data.cache",
    "data.mixing.datasets",
    "data.path",
    "data.shards",
    "description",
    "evaluation",
    "launcher",
    # Where the first weights lay does not matter any more: they are in the checkpoint.
    "model.audio.pretrained",
    "model.image.pretrained",
    "model.start_from",
    "model.text.pretrained",
    "model.video.pretrained",
    "recipe",
    "run_dir",
    "tracker",
    # Files whose content is checked by hashes in the checkpoint.
    "train.alignment.pairs",
    "train.distill.predictions",
    "train.cache_embeddings",
    "train.compile",
    # Like another number of ranks, it changes how sums are rounded, and nothing else.
    "train.deterministic",
    "train.embeddings_dir",
    "train.gradient_checkpointing",
    "train.log_every",
    "train.log_samples",
    "train.max_epochs",
    "train.max_refused",
    "train.max_skipped_steps",
    "train.max_steps",
    "train.micro_batch_size",
    "train.new_order",
    "train.num_workers",
    "train.patience",
    "train.profile",
    "train.restart",
    "train.spike_threshold",
    "train.step_timeout",
    "zero",
)
# What may change as well where training goes on with other samples (train.new_order=true).
DECIDE_ORDER = ("build", "data", "seed")


def check_resumable(saved: Mapping[str, Any], now: Mapping[str, Any], run_dir: str, *, new_order: bool = False) -> None:
    """Compare the configuration of a checkpoint with that of this start.

    Args:
        saved: the configuration stored in the checkpoint, as nested mappings.
        now: the configuration of this start, as nested mappings.
        run_dir: for the message.
        new_order: the samples may be others from here on.

    Raises:
        UserError: something changed that must not; names every key.
    """
    changed = changed_on_resume(saved, now, MAY_CHANGE + (DECIDE_ORDER if new_order else ()))
    if changed:
        raise UserError(
            f"{run_dir}: has checkpoints of another configuration: {'; '.join(changed)}; "
            "restore it, choose another run_dir, or begin anew with train.restart=true"
        )


def check_same_model(saved: Mapping[str, Any], now: Mapping[str, Any], checkpoint: str) -> None:
    """Compare model and taxonomy of a checkpoint with those of the configuration that wants to use it.

    Shapes alone would not show that two policies changed places, or that a text gets another prefix.

    Raises:
        UserError: names every key that differs.
    """
    changed = [line for line in changed_on_resume(saved, now) if line.startswith(("model.", "taxonomy."))]
    if changed:
        raise UserError(f"{checkpoint}: trained with another configuration: {'; '.join(changed)}; restore it")


def changed_on_resume(
    saved: Mapping[str, Any], now: Mapping[str, Any], may_change: tuple[str, ...] = MAY_CHANGE
) -> list[str]:
    """The keys that differ between two resolved configurations and must not.

    A key that an older version did not have yet counts as its default, which does what was done before there was one.

    Args:
        saved: the configuration stored in the checkpoint, as nested mappings.
        now: the configuration of this start, as nested mappings.
        may_change: keys, or groups of keys, that do not matter.

    Returns:
        One line for each key: its name, the old and the new value; empty when training may go on.
    """
    defaults = _defaults(Config)
    old, new = defaults | _flat(saved), defaults | _flat(now)
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [
        f"{key}: was {old.get(key, 'not set')}, is now {new.get(key, 'not set')}"
        for key in changed
        if not any(key == name or key.startswith(f"{name}.") for name in may_change)
    ]


def _defaults(schema: type) -> dict[str, Any]:
    """Dotted key -> its default; keys without one are left out."""
    leaves: dict[str, Any] = {}
    types = get_type_hints(schema)
    for entry in dataclasses.fields(schema):
        kind, factory = types[entry.name], entry.default_factory
        if dataclasses.is_dataclass(kind):
            leaves |= {f"{entry.name}.{key}": value for key, value in _defaults(cast(type, kind)).items()}
        elif factory is not dataclasses.MISSING:
            leaves |= _flat({entry.name: factory()})
        elif entry.default is not dataclasses.MISSING:
            leaves[entry.name] = entry.default
    return leaves


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value. Lists are values; an empty mapping is the same as an absent one."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves.update(_flat(value, f"{prefix}{name}."))
        else:
            leaves[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return leaves
