"""What several test files share: running commands as a user would, a small folder of posts, and one finished job."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image
from rank_jobs import LONGEST, POOL, pool
from s3_server import moto, server  # noqa: F401

if TYPE_CHECKING:
    from launched_job import Launched

# One thread a process, as ranks have it: results then do not depend on the machine's cores. CUDA is hidden, since what
# the tests compare was computed on CPU. The environment's programs come first, where nobody has activated it.
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
    done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=LONGEST)
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


class WholeJobs:
    """The program `whole_jobs.py`, and what it has done so far."""

    def __init__(self, folder: Path, *arguments: str):
        self.folder, self._said = folder, folder / "said.txt"
        line = [sys.executable, str(Path(__file__).with_name("whole_jobs.py")), str(folder), *arguments]
        given = pool().fileno()
        environment = os.environ | {POOL: str(given)}
        with self._said.open("w") as said:
            self._process = subprocess.Popen(
                line, stdout=said, stderr=said, env=environment, pass_fds=[given], start_new_session=True
            )

    def outcomes(self, name: str) -> dict[str, subprocess.CompletedProcess[str]]:
        """Wait for the commands of a part; how each ended."""
        file = self.folder / f"{name}.json"
        while not file.exists():
            assert self._process.poll() is None or file.exists(), self._said.read_text()
            time.sleep(0.05)
        return {
            command: subprocess.CompletedProcess(command, *ended) for command, *ended in json.loads(file.read_text())
        }

    def end(self) -> None:
        """With all of its commands."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


JOBS = pytest.StashKey[WholeJobs]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """What takes longest begins at once, beside the other tests. What is imported is never looked through for garbage:
    DeepSpeed asks for that at every start."""
    gc.freeze()
    wanted = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    if wanted & {"workspace", "readme"} and not session.config.option.collectonly:
        folder = session.config._tmp_path_factory.mktemp("jobs")  # type: ignore[attr-defined]
        session.config.stash[JOBS] = WholeJobs(folder, *({"readme"} & wanted))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """They end with the tests."""
    if JOBS in session.config.stash:
        session.config.stash[JOBS].end()


@pytest.fixture(scope="session")
def workspace(request: pytest.FixtureRequest) -> Path:
    """A working directory with `posts/`, the README's recipe `my_posts.yaml`, and its finished job `runs/my_posts`."""
    jobs = request.config.stash[JOBS]
    (done,) = jobs.outcomes("workspace").values()
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return jobs.folder / "workspace"


@pytest.fixture(scope="session")
def readme(request: pytest.FixtureRequest) -> WholeJobs:
    """Every command of the README, run in its order in `folder / "readme"`."""
    return request.config.stash[JOBS]


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """The job that every launcher is tried with."""
    from launched_job import Launched

    return Launched(tmp_path_factory.mktemp("launched"))
