"""Run on ranks by test_resume.py: the train stage for several run directories, one after the other, in one process."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from crossguard.configs.compose import compose
from crossguard.configs.parent_death import die_with_parent
from crossguard.data.shards.build import build_shards
from crossguard.train.ranks import end_process, init_ranks
from crossguard.train.tokenizers import load_tokenizer
from crossguard.train.training import run_training

RECIPE = """
description: A tiny text classifier with dropout, so that random generators matter.
taxonomy: {name: tiny, version: "1", policies: [{name: spam, description: Spam.}, {name: insult, description: Rude.}]}
model:
  modalities: [text]
  text:
    config: {model_type: bert, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 32,
      hidden_dropout_prob: 0.2}
    max_length: 24
  fusion: {width: 8, layers: 1, heads: 2, dropout: 0.1}
train: {batch_size: 8, micro_batch_size: 2, warmup_steps: 2, lr: 1e-2, num_workers: 0, log_samples: true,
  freeze: ["text.*embeddings.position*"]}
evaluation: {every_steps: 0, min_positives: 2}
checkpoint: {every_steps: 4, keep_last: 2}
tracker: {name: none}
"""


def write_job(folder: Path) -> None:
    """A recipe `tiny.yaml` and 160 posts, some labels unknown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.yaml").write_text(RECIPE)
    draw = random.Random(0)
    with (folder / "posts.jsonl").open("w") as posts:
        for number in range(160):
            spam = int(draw.random() < 0.4)
            text = " ".join(draw.choices(["abc", "def", "ghij", "klm"], k=draw.randint(1, 9))) + (" !!" if spam else "")
            labels = {"spam": spam, "insult": draw.choice([0, 1, None, 0.67])}
            split = "train" if number < 110 else "validation" if number < 140 else "test"
            posts.write(json.dumps({"id": f"p{number}", "text": text, "labels": labels, "split": split}) + "\n")


def write_shards(folder: Path) -> None:
    """The job, and its posts built into `shards/`."""
    write_job(folder)
    build_shards(compose(arguments(folder, "build")), folder / "shards", folder / "build" / "quarantine.jsonl")


def arguments(folder: Path, run_dir: str, *overrides: str) -> list[str]:
    """What a user would write after `-m crossguard.train`."""
    places = [
        f"recipe={folder / 'tiny.yaml'}",
        f"data.path={folder / 'posts.jsonl'}",
        f"data.shards={folder / 'shards'}",
    ]
    return [*places, f"run_dir={folder / run_dir}", *overrides]


def token_lengths(folder: Path) -> dict[str, int]:
    """Tokens of each post, by id."""
    text = compose(arguments(folder, "")).model.text
    posts = [json.loads(line) for line in (folder / "posts.jsonl").read_text().splitlines()]
    return {post["id"]: len(load_tokenizer(text).encode(post["text"], text.max_length)) for post in posts}


def main(jobs: list[list[str]]) -> None:
    """Train each job."""
    die_with_parent()
    ranks = init_ranks()
    for job in jobs:
        run_training(compose(job), ranks)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    end_process(0)
