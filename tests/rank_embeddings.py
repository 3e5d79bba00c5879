"""Run on 2 ranks by test_embeddings.py: embeddings that all ranks compute, and weights that ZeRO-3 shares out."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from embeddings_job import SEAMS, TRUNK, job

from crossguard.configs.parent_death import die_with_parent
from crossguard.configs.schema.model import ModelConfig
from crossguard.train.ranks import end_process, init_ranks
from crossguard.train.training import run_training


def with_pretrained(model: ModelConfig, folder: Path) -> ModelConfig:
    """The same with a text encoder that is read from a folder."""
    return replace(model, text=replace(model.text, config={}, pretrained=str(folder / "encoder")))


def main(folder: Path) -> None:
    """Train as the test did on one rank."""
    die_with_parent()
    ranks = init_ranks()
    for seam, stage in (("fused", 3), ("summaries", 1), ("tokens", 3), ("beside", 2)):
        model, freeze = SEAMS[seam]
        run_training(job(folder, f"{seam}-2", model, stage, freeze=freeze, cache_embeddings=True), ranks)
    model = replace(with_pretrained(SEAMS["fused"][0], folder), start_from=str(folder / "pretrained"))
    run_training(job(folder, "started", model, 3, freeze=TRUNK), ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_process(0)
