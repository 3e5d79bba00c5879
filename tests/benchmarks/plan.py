"""What `crossguard plan` predicts, against the most memory that a rank of a real run takes: 2 ranks, every ZeRO stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

from rank_models import torchrun
from table import Line, show

from crossguard.configs.compose import compose
from crossguard.train.planning.plan import make_plan

RANKS = 2
# The share of the measured memory that a prediction may be away from it.
TARGET = 0.15
RECIPE = """
description: Text and image, 103 million parameters.
taxonomy: {name: planned, version: "1", policies: [{name: spam, description: Spam.}, {name: insult, description: Rude.}]}
data: {source: synthetic}
model:
  modalities: [text, image]
  text:
    config: {model_type: bert, hidden_size: 768, num_hidden_layers: 10, num_attention_heads: 12, intermediate_size: 3072,
      hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0, max_position_embeddings: 128, vocab_size: 24000}
    max_length: 128
  image:
    config: {model_type: vit, hidden_size: 384, num_hidden_layers: 6, num_attention_heads: 6, intermediate_size: 1536,
      hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0, patch_size: 8}
    size: 64
  fusion: {width: 384, layers: 1}
train: {batch_size: 16, micro_batch_size: 4}
cluster: {gpus_per_node: 2}
"""


def main() -> bool:
    """Measure and compare; whether every prediction is near enough."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "planned.yaml"
        recipe.write_text(RECIPE)
        lines = []
        for precision in ("fp32", "bf16"):
            job = [f"recipe={recipe}", f"train.precision={precision}"]
            ways = make_plan(compose(job)).ways
            for way in ways:
                stage = way.case.stage
                measured = measure([*job, f"zero={stage}"], Path(folder) / "measured.json")
                name = f"zero={stage}, {precision}"
                lines += [
                    Line(f"{name}: predicted against measured", way.memory.total / 1e9, measured / 1e9, None, "GB"),
                    Line(
                        f"{name}: the difference", abs(way.memory.total - measured) / 1e9, measured / 1e9, TARGET, "GB"
                    ),
                ]
                print(
                    f"{name}: {way.memory.total / 1e9:.2f} GB predicted, {measured / 1e9:.2f} GB measured", flush=True
                )
    return show("Planned memory of a rank, above what it takes after imports", lines)


def measure(job: list[str], output: Path) -> float:
    """Bytes: the mean of the ranks' highest."""
    # Processes of their own: those that the tests fork share memory with others.
    subprocess.run(torchrun(RANKS, Path(__file__).parent / "plan_rank.py", json.dumps(job), str(output)), check=True)
    return sum(json.loads(output.read_text())) / RANKS


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    sys.exit(not main())
