"""The bundle: everything that serving needs, in one folder, without DeepSpeed, a hub or the training data.

model.safetensors   every weight, whole, fp32
config.json         the model's configuration; encoders that came from a hub are described in full
tokenizer/          the tokenizer's files
taxonomy.json       the policies, in the order of the scores
decisions.json      calibration and thresholds, as `crossguard evaluate` found them on the validation split
card.md             what was trained on what, and what was measured
manifest.json       every file above with its hash, and the lineage: shards and checkpoint
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from crossguard.configs.errors import UserError
from crossguard.configs.resume import check_same_model
from crossguard.configs.saved import as_plain, part_of
from crossguard.configs.schema import Config, ModelConfig
from crossguard.configs.schema.encoders import EncoderConfig, LoraConfig
from crossguard.configs.schema.model import ENCODED
from crossguard.data.shards.files import sync
from crossguard.data.taxonomy import Taxonomy
from crossguard.train.checkpoint import best_valid
from crossguard.train.checkpoint_folder import read_state, step_of
from crossguard.train.encode import PostEncoder
from crossguard.train.evaluation.decisions import Decisions
from crossguard.train.export.card import model_card
from crossguard.train.export.measured import decisions_of
from crossguard.train.models import Classifier, without_pretrained
from crossguard.train.models.lora import merge_lora
from crossguard.train.ranks import Ranks
from crossguard.train.stored_weights import load_weights
from crossguard.train.tokenizers import BYTES, load_tokenizer
from crossguard.train.trained import load_trained

FORMAT = 3
STAGING = ".staging-bundle-"
WEIGHTS, CONFIG, TOKENIZER, TAXONOMY, DECISIONS, CARD, MANIFEST = (
    "model.safetensors",
    "config.json",
    "tokenizer",
    "taxonomy.json",
    "decisions.json",
    "card.md",
    "manifest.json",
)


class Bundle(NamedTuple):
    """A loaded bundle: `model(batch)` gives logits for batches of what `encode` makes of posts."""

    model: Classifier
    encode: PostEncoder
    taxonomy: Taxonomy
    decisions: Decisions


def write_bundle(config: Config, run_dir: Path) -> Path:
    """Export the best checkpoint of a run to `run_dir/bundle`, complete or not at all; an older bundle is replaced.

    Raises:
        UserError: there is no checkpoint, or it is damaged or of another model.
    """
    final, staging = run_dir / "bundle", run_dir / f"{STAGING}{os.getpid()}"
    for remains in run_dir.glob(f"{STAGING}*"):
        shutil.rmtree(remains)
    staging.mkdir()
    try:
        _fill(staging, config, run_dir)
    except BaseException:
        shutil.rmtree(staging)
        raise
    if final.exists():
        replaced = run_dir / f"{STAGING}replaced"
        final.rename(replaced)
        staging.rename(final)
        shutil.rmtree(replaced)
    else:
        staging.rename(final)
    return final


def _fill(staging: Path, config: Config, run_dir: Path) -> None:
    encode = PostEncoder(config.model, Taxonomy.from_config(config.taxonomy))
    checkpoint = best_valid(run_dir, Ranks(0, 0, 1, torch.device("cpu")))
    check_same_model(read_state(checkpoint)["config"], as_plain(config), str(checkpoint))
    model = load_trained(config.model, encode, load_weights(checkpoint), checkpoint)
    if any(encoder.lora.rank for encoder in config.model.encoders.values()):
        merge_lora(model)
    # Weights that two names share are stored under both: safetensors refuses shared memory.
    save_file({name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}, staging / WEIGHTS)
    (staging / WEIGHTS).chmod(0o644)  # safetensors keeps files to their owner, and others serve this one
    described = _self_contained(config.model, model)
    _write(staging / CONFIG, {"format": FORMAT, "recipe": config.recipe, "model": described})
    encode.tokenizer.save(staging / TOKENIZER)
    _write(staging / TAXONOMY, encode.taxonomy.to_json())
    _write(staging / DECISIONS, decisions_of(run_dir, step_of(checkpoint)).to_json())
    (staging / CARD).write_text(model_card(config, run_dir, step_of(checkpoint)), encoding="utf-8")
    about = {"format": FORMAT, "lineage": _lineage(checkpoint), "files": _hashes(staging)}
    _write(staging / MANIFEST, about)
    sync(staging)


def load_bundle(folder: Path) -> Bundle:
    """Load a bundle on the CPU, ready to score.

    Raises:
        UserError: a file is missing or altered, or this version does not know the bundle's format.
    """
    config, encode = open_bundle(folder)
    model = load_trained(config, encode, load_file(folder / WEIGHTS), folder)
    return Bundle(model, encode, encode.taxonomy, Decisions.from_json(_read(folder / DECISIONS)))


def open_bundle(folder: Path) -> tuple[ModelConfig, PostEncoder]:
    """What a bundle's model is and reads, once every file is known to be whole; raises as `load_bundle` does."""
    manifest = _read(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder / MANIFEST}: format {manifest.get('format')}, this version of crossguard reads {FORMAT}; "
            "export the bundle again"
        )
    found = _hashes(folder)
    for name, expected in manifest["files"].items():
        if found.get(name) != expected:
            what = "missing" if name not in found else "its content is not what the manifest says"
            raise UserError(f"{folder / name}: {what}; export the bundle again")
    config = part_of(ModelConfig, _read(folder / CONFIG)["model"], folder / CONFIG)
    taxonomy = Taxonomy.from_json(_read(folder / TAXONOMY))
    return config, PostEncoder(config, taxonomy, load_tokenizer(config.text, folder / TOKENIZER))


def _self_contained(config: ModelConfig, model: Classifier) -> dict[str, Any]:
    """The configuration with every encoder described in full, its adapters merged into it, and the tokenizer in the
    bundle's own folder."""
    name = config.text.tokenizer or config.text.pretrained or BYTES
    text = dataclasses.replace(config.text, tokenizer=BYTES if name == BYTES else TOKENIZER)
    plain: dict[str, Any] = {
        name: dataclasses.replace(encoder, lora=LoraConfig())
        for name, encoder in {**_every_encoder(config), "text": text}.items()
    }
    described = dataclasses.asdict(without_pretrained(dataclasses.replace(config, start_from=None, **plain), model))
    for name in ENCODED:
        described[name]["config"].pop("_name_or_path", None)  # may be a path of this machine
    return described


def _every_encoder(config: ModelConfig) -> dict[str, EncoderConfig]:
    return {name: getattr(config, name) for name in ENCODED}


def _lineage(checkpoint: Path) -> dict[str, str]:
    """The hash of the shards' manifest that was trained on, and the checkpoint with the hash of its own."""
    digest = hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()
    shards = read_state(checkpoint)["order"]["manifest"]
    return {"shards": shards, "checkpoint": checkpoint.name, "checkpoint_manifest": digest}


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file but the manifest."""
    hashes = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        with file.open("rb") as opened:
            hashes[file.relative_to(folder).as_posix()] = hashlib.file_digest(opened, "sha256").hexdigest()
    return hashes


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: unreadable ({error}); is this the folder that `crossguard export` wrote?") from None
    return content
