"""What the tests of builds share: posts with pictures, a configuration, and a program that builds (and may be killed)."""

from __future__ import annotations

import io
import itertools
import json
import os
import pkgutil
import signal
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from crossguard.configs.schema import BuildConfig, Config, DataConfig, ModelConfig, TaxonomyConfig
from crossguard.configs.schema.encoders import TextEncoderConfig
from crossguard.configs.schema.taxonomy import PolicyConfig
from crossguard.data.shards.build import build_shards
from crossguard.data.shards.manifest import Manifest

POLICIES = ("hate", "spam")


def make_config(path: Path | None, *, data: dict[str, Any] | None = None, **build: Any) -> Config:
    """A recipe that builds from `path`; `build` are settings of its build group."""
    return Config(
        taxonomy=TaxonomyConfig(name="test", policies=[PolicyConfig(name=name) for name in POLICIES]),
        data=DataConfig(path=str(path) if path else None, **(data or {})),
        build=BuildConfig(**{"num_workers": 1, "samples_per_shard": 8, **build}),
        model=ModelConfig(modalities=["text"], text=TextEncoderConfig(config={"model_type": "bert"})),
    )


def picture(kind: str = "PNG", color: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    """A small picture as the bytes of a file."""
    data = io.BytesIO()
    Image.new("RGB", (16, 12), color).save(data, kind)
    return data.getvalue()


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    """A JSON lines file, its folder included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def make_posts(count: int) -> list[dict[str, Any]]:
    """Text posts in two languages with every label state; ids that are hard on file names."""
    posts = []
    for number in range(count):
        labels = {"hate": (1, 0, 0, 1 / 3, None)[number % 5], "spam": (0, 1, 0)[number % 3]}
        language = {"language": "de"} if number % 2 else {}
        posts.append({"id": f"пост/{number}.a b", "text": f"text {number} नमस्ते", "labels": labels, **language})
    return posts


def build(config: Config, run_dir: Path, **given: Any) -> Manifest:
    """Build into `run_dir` as the recipes do."""
    return build_shards(config, run_dir / "shards", run_dir / "quarantine.jsonl", **given)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file under a folder by its relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def build_line(posts: Path, run_dir: Path, workers: int, *more: str) -> list[str]:
    """The command that runs this file: builds with two posts a shard; `more` is where to be killed, or "append"."""
    return [sys.executable, __file__, str(posts), str(run_dir), str(workers), *more]


def kill_at(function: str, call: int) -> None:
    """Have this process killed where it would make its `call`-th call of `module.function`."""
    path, _, name = function.rpartition(".")
    # The part of a module, or of a class in it, that makes the call.
    owner: Any = pkgutil.resolve_name(path)
    calls = itertools.count(1)
    original = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


if __name__ == "__main__":
    posts_path, run_path, num_workers, *more = sys.argv[1:]
    if len(more) > 1:
        kill_at(more[0], int(more[1]))
    settings = {"samples_per_shard": 2, "num_workers": int(num_workers), "append": "append" in more}
    build(make_config(Path(posts_path), **settings), Path(run_path))
