"""The posts that the benchmarks load: photo-like JPEGs of 448 x 448 with captions in several scripts, in every peer's
format. Each format holds the same bytes."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from crossguard.configs.schema import BuildConfig, Config, DataConfig, ModelConfig, TaxonomyConfig, TrainConfig
from crossguard.configs.schema.encoders import ImageEncoderConfig, TextEncoderConfig
from crossguard.configs.schema.taxonomy import PolicyConfig
from crossguard.data.shards.index import VERSION as INDEX_VERSION
from crossguard.data.shards.manifest import FORMAT

POSTS = 1536
BATCH = 32
SIDE = 448
IMAGE_SIZE = 224
MAX_TOKENS = 512
POLICIES = ("hate", "harassment", "spam")
POSTS_PER_SHARD = 192
# About as many posts in a shard of the others.
SHARD_BYTES = 8 << 20
# First letter of an alphabet, letters in it, mean logarithm of a caption's length in letters.
SCRIPTS = {
    "en": ("a", 26, 4.5),
    "ru": ("а", 32, 4.2),
    "ar": ("ا", 36, 4.0),
    "hi": ("अ", 50, 3.8),
    "zh": ("一", 3000, 3.0),
    "ko": ("가", 2000, 3.2),
}


def config(folder: Path) -> Config:
    """The recipe of the posts in `folder`."""
    return Config(
        recipe="benchmark",
        run_dir=str(folder / "run"),
        seed=1,
        taxonomy=TaxonomyConfig("benchmark", "1", [PolicyConfig(name) for name in POLICIES]),
        model=ModelConfig(
            text=TextEncoderConfig(build="none:none", tokenizer="bytes", max_length=MAX_TOKENS),
            image=ImageEncoderConfig(build="none:none", size=IMAGE_SIZE),
        ),
        data=DataConfig(path=str(folder / "raw" / "posts.jsonl"), shards=str(folder / "shards")),
        build=BuildConfig(num_workers=2, samples_per_shard=POSTS_PER_SHARD),
        train=TrainConfig(batch_size=BATCH, micro_batch_size=BATCH, num_workers=2),
    )


def _marker(folder: Path) -> Path:
    """Stands when everything is there, in today's format."""
    return folder / f"complete-{FORMAT}-{INDEX_VERSION}"


def prepare(folder: Path) -> None:
    """Write the posts in every format, unless they are there."""
    if _marker(folder).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    raw = folder / "raw"
    raw.mkdir(parents=True)
    print("writing the benchmark's posts …", file=sys.stderr)
    with get_context("spawn").Pool(2) as pool:
        posts = pool.map(partial(_write_post, raw), range(POSTS), chunksize=32)
    (raw / "posts.jsonl").write_text("".join(json.dumps(post) + "\n" for post in posts))
    _write_shards(folder)
    _write_mds(folder, posts)
    _write_litdata(folder)
    _marker(folder).touch()


def _write_post(raw: Path, number: int) -> dict[str, Any]:
    """Write a post's files and return it as a line of posts.jsonl."""
    random = np.random.default_rng(number)
    language = list(SCRIPTS)[number % len(SCRIPTS)]
    labels = {name: int(random.random() < 0.2) for name in POLICIES}
    post = {"id": f"post-{number}", "text": _caption(random, language), "language": language, "labels": labels}
    (raw / f"{number:06}.json").write_text(json.dumps(post, ensure_ascii=False))
    (raw / f"{number:06}.jpg").write_bytes(_photo(random))
    return post | {"image": f"{number:06}.jpg", "split": "train"}


def _caption(random: np.random.Generator, language: str) -> str:
    first, letters, mean = SCRIPTS[language]
    length = int(np.clip(random.lognormal(mean, 0.8), 4, MAX_TOKENS))
    text = np.char.add("", [chr(ord(first) + number) for number in random.integers(letters, size=length)])
    text[random.random(length) < 0.15] = " "
    return "".join(text)


def _photo(random: np.random.Generator) -> bytes:
    """A JPEG with the sizes and frequencies of a photo: soft light, edges, texture, grain; 40 to 60 KB."""
    light = Image.fromarray(random.integers(40, 216, (5, 5, 3), dtype=np.uint8))
    picture = light.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(14):
        x, y, width, height = random.integers(-40, SIDE, 2).tolist() + random.integers(20, 200, 2).tolist()
        shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
        shape((x, y, x + width, y + height), fill=tuple(random.integers(0, 256, 3).tolist()))
    texture = Image.fromarray(random.normal(128, 18, (SIDE // 3, SIDE // 3)).clip(0, 255).astype(np.uint8))
    soft = np.asarray(texture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32)[..., None] - 128
    grain = random.standard_normal((SIDE, SIDE, 1), dtype=np.float32) * random.uniform(2, 4.5)
    pixels = (np.asarray(picture, dtype=np.float32) + soft + grain).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=86)
    return file.getvalue()


def _write_shards(folder: Path) -> None:
    """Plain WebDataset tars, read by crossguard and by webdataset."""
    from crossguard.data.shards.build import build_shards

    build_shards(config(folder), folder / "shards", folder / "quarantine.jsonl")


def _write_mds(folder: Path, posts: list[dict[str, Any]]) -> None:
    """Once with the image column that its documentation shows, once with the bytes as they are."""
    from peers import import_streaming

    for encoding in ("jpeg", "bytes"):
        columns = {"image": encoding, "text": "str", "post": "json"}
        with import_streaming().MDSWriter(
            out=str(folder / f"mds-{encoding}"), columns=columns, size_limit=SHARD_BYTES
        ) as out:
            for post in posts:
                path = folder / "raw" / post["image"]
                image = Image.open(path) if encoding == "jpeg" else path.read_bytes()
                out.write({"image": image, "text": post["text"], "post": _fields(post)})


def _write_litdata(folder: Path) -> None:
    import litdata

    litdata.optimize(
        fn=read_raw,
        inputs=sorted(str(path) for path in (folder / "raw").glob("*.jpg")),
        output_dir=str(folder / "litdata"),
        chunk_bytes=SHARD_BYTES,
        num_workers=1,
    )


def read_raw(image: str) -> dict[str, Any]:
    """A post of the folder `raw`, by its image's path."""
    path = Path(image)
    post = json.loads(path.with_suffix(".json").read_bytes())
    return {"image": path.read_bytes(), "text": post["text"], "post": json.dumps(_fields(post))}


def _fields(post: dict[str, Any]) -> dict[str, Any]:
    return {name: post[name] for name in ("id", "language", "labels")}


def default_folder() -> Path:
    """Where the posts are kept between runs; CROSSGUARD_BENCHMARKS names another folder."""
    here = Path(__file__).resolve().parents[2] / ".benchmarks"
    return Path(os.environ.get("CROSSGUARD_BENCHMARKS", here))
