"""What several test files share: running commands as a user would, a small folder of posts, and one finished job."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

if TYPE_CHECKING:
    from launched_job import Launched

# One thread a process, as ranks have it: results then do not depend on the machine's cores. CUDA is hidden, since what
# the tests compare was computed on CPU. The environment's programs come first: DeepSpeed builds its operator anew when
# it finds another ninja than before.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "WANDB_MODE": "offline",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def run_command(line: list[str], cwd: Path, *, status: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run a command; by default it must succeed."""
    done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=280)
    if status is not None:
        assert done.returncode == status, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done


def readme_block(language: str) -> str:
    """The first block of the README in this language."""
    found = re.search(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found.group(1)


WORDS = {
    "en": ["meet", "at", "the", "river", "tomorrow", "win", "phone"],
    "es": ["nos", "vemos", "mañana", "en", "el", "río", "gana"],
    "ar": ["نلتقي", "غدا", "عند", "النهر", "اربح", "هاتف"],
}


def write_posts(folder: Path, count: int = 240, seed: int = 0) -> Path:
    """A folder of small posts in three languages with pictures, every label state and every split; returns the file."""
    draw = random.Random(seed)
    (folder / "img").mkdir(parents=True)
    lines = []
    for number in range(count):
        language = draw.choice(list(WORDS))
        spam = draw.random() < 0.4
        post = {
            "id": f"post/{number}.é",
            "language": language,
            "text": " ".join(draw.choices(WORDS[language], k=draw.randint(2, 12))) + (" !!" if spam else ""),
            "labels": {"spam": int(spam), "insult": draw.choice([0, 1, None, 0.67])},
            "split": "train" if number < count * 0.7 else ("validation" if number < count * 0.8 else "test"),
        }
        if draw.random() < 0.5:
            colour = tuple(draw.randrange(256) for _ in range(3))
            name = f"img/{number}.{draw.choice(['jpg', 'png', 'webp'])}"
            Image.new("RGB", (draw.randint(20, 90), 40), colour).save(folder / name)
            post["image"] = name
            if draw.random() < 0.2:
                del post["text"]
        lines.append(json.dumps(post, ensure_ascii=False))
    file = folder / "posts.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


# What makes the README's first recipe small enough for a test; everything else stays as the README has it.
SMALL = [
    "train.max_steps=4",
    "evaluation.every_steps=2",
    "evaluation.min_positives=2",
    "train.log_samples=true",
    "checkpoint.every_steps=2",
]


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with `posts/`, the README's recipe `my_posts.yaml`, and its finished job `runs/my_posts`."""
    folder = tmp_path_factory.mktemp("workspace")
    write_posts(folder / "posts")
    (folder / "my_posts.yaml").write_text(readme_block("yaml"), encoding="utf-8")
    run_command(["crossguard", "run", "recipe=my_posts.yaml", *SMALL], folder)
    return folder


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """The job that every launcher is tried with."""
    from launched_job import Launched

    return Launched(tmp_path_factory.mktemp("launched"))
