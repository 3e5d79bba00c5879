"""What the tests of evaluation and export share: a run directory with shards and a checkpoint, made without training.

Run as a program it evaluates such a run directory, as a rank of torchrun.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from crossguard.configs.saved import as_plain, load_config, save_config
from crossguard.configs.schema import BuildConfig, Config, DataConfig, EvaluationConfig, ModelConfig, TaxonomyConfig
from crossguard.configs.schema.encoders import ImageEncoderConfig, TextEncoderConfig
from crossguard.configs.schema.fusion import FusionConfig
from crossguard.configs.schema.taxonomy import PolicyConfig
from crossguard.data.shards.build import build_shards
from crossguard.data.taxonomy import Taxonomy
from crossguard.train import checkpoint_folder
from crossguard.train.checkpoint_manifest import entry
from crossguard.train.encode import PostEncoder
from crossguard.train.evaluation.stage import run_evaluation
from crossguard.train.fragments import WEIGHT, tensor_shapes
from crossguard.train.models import build_model
from crossguard.train.ranks import Ranks, end_process, init_ranks, leave_ranks

ALONE = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
MODEL = ModelConfig(
    text=TextEncoderConfig(config={"model_type": "bert", **TINY}, max_length=48),
    image=ImageEncoderConfig(config={"model_type": "vit", "patch_size": 8, **TINY}, size=16),
    fusion=FusionConfig(width=16, heads=2),
)
POLICIES = [PolicyConfig(name="spam", description="Unwanted <advertising>."), PolicyConfig(name="insult")]


def make_config(posts: Path, run_dir: Path, **groups: Any) -> Config:
    """A recipe for posts of `conftest.write_posts`."""
    evaluation = EvaluationConfig(batch_size=8, min_positives=3, references=["tfidf_logistic_regression"])
    config = Config(
        recipe="small",
        description="A small job.",
        run_dir=str(run_dir),
        taxonomy=TaxonomyConfig(name="small", policies=POLICIES),
        data=DataConfig(path=str(posts)),
        build=BuildConfig(num_workers=1, samples_per_shard=30),
        model=MODEL,
        evaluation=evaluation,
        ablations={"text_only": ["model.modalities=[text]"], "never_trained": ["model.modalities=[image]"]},
    )
    config.train.num_workers = 0
    config.tracker.name = "none"
    return replace(config, **groups)


def make_run(config: Config) -> None:
    """Shards, configuration and a checkpoint after step 3 whose weights are no longer the first ones."""
    run_dir = Path(config.run_dir)
    shards_dir = Path(config.data.shards) if config.data.shards else run_dir / "shards"
    manifest = build_shards(config, shards_dir, run_dir / "quarantine.jsonl")
    save_config(config, run_dir / "config.yaml")
    encode = PostEncoder(config.model, Taxonomy.from_config(config.taxonomy))
    model = build_model(config.model, encode.taxonomy, encode.tokenizer, config.seed)
    generator = torch.Generator().manual_seed(5)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for tensor in weights.values():
        if tensor.is_floating_point():
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    staging = checkpoint_folder.open_staging(run_dir, 3)
    fragments = {f"{WEIGHT}:0:{name}": tensor.flatten() for name, tensor in weights.items()}
    save_file(fragments, staging / "fragments-00000.safetensors")
    state = {
        "step": 3,
        "shapes": tensor_shapes(model),
        "order": {"manifest": manifest.sha256},
        "config": as_plain(config),
        "tracker_run_id": "tracked" if config.tracker.name == "wandb" else None,
    }
    (staging / checkpoint_folder.STATE).write_text(json.dumps(state))
    entries = {file.name: entry(file.read_bytes()) for file in staging.iterdir()}
    checkpoint_folder.commit(staging, 3, entries, best=False)


def add_ablation(config: Config, name: str, modalities: list[str]) -> None:
    """A run directory below the run's, on the same shards."""
    run_dir = Path(config.run_dir)
    data = replace(config.data, shards=config.data.shards or str(run_dir / "shards"))
    model = replace(config.model, modalities=modalities)
    make_run(replace(config, run_dir=str(run_dir / "ablations" / name), data=data, model=model))


if __name__ == "__main__":
    ranks = init_ranks()
    run_evaluation(load_config(Path(sys.argv[1]) / "config.yaml"), ranks)
    leave_ranks()
    end_process(0)
