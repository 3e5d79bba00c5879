"""Cached embeddings: the same training, without looking at the posts again."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_posts
from embeddings_job import ENCODERS, SEAMS, TRUNK, blocks, job, seen, weights_of
from evaluation_job import MODEL
from rank_embeddings import with_pretrained
from rank_models import alone, run_ranks
from test_encoders import save_pretrained_text

from crossguard.configs.errors import UserError
from crossguard.configs.schema import Config
from crossguard.configs.schema.train import TextAttacksConfig
from crossguard.data.loading import embeddings as files
from crossguard.data.loading import loader
from crossguard.data.loading.loader import BatchMaker, Task
from crossguard.data.loading.reader import ShardReader
from crossguard.data.shards.build import build_shards
from crossguard.data.shards.folder import ShardFolder
from crossguard.data.taxonomy import Taxonomy
from crossguard.train import embeddings
from crossguard.train.encode import PostEncoder
from crossguard.train.training import run_training

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Posts, their shards, and the jobs that were done on two ranks."""
    folder = tmp_path_factory.mktemp("embeddings")
    write_posts(folder / "posts", 120)
    build_shards(job(folder, "build"), folder / "shards", folder / "quarantine.jsonl")
    save_pretrained_text(folder / "encoder")
    # Of a model whose encoders have moved away from what is in the folder.
    run_training(job(folder, "pretrained", with_pretrained(MODEL, folder), max_steps=2), alone())
    run_ranks(2, HERE / "rank_embeddings.py", str(folder))
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, Config]:
    """The same without embeddings, on one rank."""
    jobs = {seam: job(folder, seam, model, freeze=freeze) for seam, (model, freeze) in SEAMS.items()}
    for config in jobs.values():
        run_training(config, alone())
    return jobs


@pytest.mark.parametrize("seam", SEAMS)
def test_two_ranks_with_embeddings_train_as_one_without(folder: Path, plain: dict[str, Config], seam: str) -> None:
    figures, ids = seen(plain[seam])
    cached = job(folder, f"{seam}-2", SEAMS[seam][0])
    found, found_ids = seen(cached)
    assert len(figures) == 8
    assert found == pytest.approx(figures, abs=1e-6)
    assert found_ids == ids
    assert abs(figures[0] - figures[-2]) > 1e-3
    for name, tensor in weights_of(plain[seam]).items():  # AdamW enlarges the last digits of the smallest gradients.
        assert torch.allclose(weights_of(cached)[name], tensor, atol=1e-5), name
    # Of the training split and of validation, the test split is not looked at.
    assert len(blocks(cached)) == 4


def test_weights_are_shared_out_as_an_earlier_run_left_them(folder: Path) -> None:
    """Under ZeRO-3, into encoders that no rank holds."""
    started = weights_of(job(folder, "started", with_pretrained(MODEL, folder)))
    earlier = weights_of(job(folder, "pretrained", with_pretrained(MODEL, folder)))
    trunk = [name for name in earlier if not name.startswith("heads.")]
    assert len(trunk) > 20
    assert all(torch.equal(started[name], earlier[name]) for name in trunk)


def test_it_goes_on_where_it_was_stopped(
    folder: Path, plain: dict[str, Config], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Blocks that are whole are not computed again; damaged ones and those of other weights are not used."""
    config = job(folder, "stopped", freeze=TRUNK, cache_embeddings=True)

    class Stopped(Exception):
        pass

    def stop_at_second(*arguments: object) -> Path:
        if blocks(config):
            raise Stopped
        return files.write_block(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(embeddings, "write_block", stop_at_second)
        with pytest.raises(Stopped):
            run_training(config, alone())
    (first,) = blocks(config)
    about = first.stat()
    (first.parent / f".{first.name}.tmp").write_bytes(b"half")
    (first.parent.parent / "of-other-weights").mkdir()
    run_training(config, alone())
    assert seen(config)[0] == pytest.approx(seen(plain["fused"])[0], abs=1e-6)
    assert first.stat().st_mtime_ns == about.st_mtime_ns
    assert sorted((Path(config.run_dir) / "embeddings").rglob("*")) == [first.parent, *blocks(config)]
    before = blocks(config)
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    capfd.readouterr()
    shutil.rmtree(Path(config.run_dir) / "checkpoints")
    run_training(config, alone())
    assert "altered" in capfd.readouterr().err
    assert blocks(config) == before
    assert files.is_whole(first)


def test_what_cannot_be_read_is_refused_as_ever(folder: Path, tmp_path: Path) -> None:
    """A post whose bytes were altered before, one whose labels were altered after; the others come in the same order."""
    shutil.copytree(folder / "posts", tmp_path / "posts")
    shutil.copytree(folder / "shards", tmp_path / "shards")
    plain = job(tmp_path, "plain", freeze=TRUNK, max_refused=1.0, max_steps=20)
    cached = job(tmp_path, "cached", freeze=TRUNK, max_refused=1.0, max_steps=20, cache_embeddings=True)
    damage(tmp_path / "shards", b".jpg", 600)
    run_training(plain, alone())
    run_training(cached, alone())
    refused = [quarantined(config) for config in (plain, cached)]
    assert refused[0] == refused[1] != []
    assert seen(plain)[1] == seen(cached)[1]
    assert seen(cached)[0] == pytest.approx(seen(plain)[0], abs=1e-6)


def damage(shards: Path, extension: bytes, offset: int) -> None:
    """Alter a byte of the first member of a training shard with this extension; the file stays as old as it was."""
    tar = next(path for path in sorted((shards / "train").glob("*.tar")) if extension in path.read_bytes())
    content, about = bytearray(tar.read_bytes()), tar.stat()
    content[content.index(extension) + offset] ^= 1
    tar.write_bytes(content)
    os.utime(tar, ns=(about.st_atime_ns, about.st_mtime_ns))


def quarantined(config: Config) -> list[dict[str, object]]:
    return [json.loads(line) for line in (Path(config.run_dir) / "quarantine.jsonl").read_text().splitlines()]


def test_labels_are_those_that_were_embedded_and_what_has_expired_is_not_read(
    folder: Path, plain: dict[str, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job(folder, "fused-2")
    reader = ShardReader([ShardFolder.open(str(folder / "shards"), config.data.cache)], "train")
    found = {name: path for path in blocks(config) for name in files.find_blocks(path.parent)}
    every = files.Embeddings(files.blocks_of(reader), files.find_blocks(blocks(config)[0].parent))
    assert found
    encode = PostEncoder(config.model, Taxonomy.from_config(config.taxonomy))
    maker = BatchMaker(reader, encode, None, every)
    monkeypatch.setattr(reader, "read", lambda row: pytest.fail("the post itself was read"))
    made = maker[Task(np.arange(8))]
    assert made.arrays is not None
    assert made.rows == list(range(8))
    assert set(made.arrays["embeddings"]) == {"fused"}
    assert made.arrays["embeddings"]["fused"].std() > 0.1
    monkeypatch.undo()
    head = reader.read_head

    def relabeled(row: int) -> object:
        sample = head(row)
        sample.post["labels"]["spam"] = 0.5
        return sample

    monkeypatch.setattr(reader, "read_head", relabeled)
    refused = maker[Task(np.arange(2))].refused
    assert [line["row"] for line in refused] == [0, 1]
    assert all("could not be read when embeddings were computed" in str(line["reason"]) for line in refused)
    monkeypatch.undo()
    monkeypatch.setattr(loader, "refused_at_read", lambda post, now: "expired")
    made = maker[Task(np.arange(2))]
    assert made.arrays is None
    assert [line["reason"] for line in made.refused] == ["expired", "expired"]


def test_what_changes_cannot_be_cached(folder: Path) -> None:
    with pytest.raises(UserError, match=r"train\.cache_embeddings=true: freeze the encoders"):
        job(folder, "none", cache_embeddings=True)
    with pytest.raises(UserError, match=r"set train\.attacks\.once=true"):
        job(folder, "none", cache_embeddings=True, freeze=ENCODERS, attacks=TextAttacksConfig(probability=0.5))
    with pytest.raises(UserError, match=r"no encoder is frozen as a whole.*freeze one of text, image"):
        run_training(job(folder, "none", freeze=["text.encoder.embeddings"], cache_embeddings=True), alone())


@pytest.mark.parametrize(
    "frozen", [["text"], ["image"], ["text", "image"], ["text", "ngrams"], TRUNK, [*TRUNK, "ngrams"]]
)
@pytest.mark.parametrize("kind", ["gated", "joint"])
def test_what_is_trained_reads_the_posts_beside_the_embeddings(frozen: list[str], kind: str) -> None:
    """Of what is frozen nothing is looked at again, and the logits are those of whole posts."""
    from test_ngrams import READ, SMALL
    from tiny_models import batch_of, build, model_config

    from crossguard.train.models.embedding import Seam
    from crossguard.train.optimizer import freeze

    config = replace(model_config(), modalities=["text", "ngrams", "image"], ngrams=SMALL)
    model = build(replace(config, fusion=replace(config.fusion, kind=kind)))
    torch.nn.init.normal_(model.ngrams.table.weight)
    freeze(model, frozen)
    whole = batch_of(*READ)
    with torch.no_grad():
        cached = model(whole, Seam.of(model))
        unread = [replace(post, input_ids=None) if "text" in frozen else post for post in READ]
        unread = [replace(post, images=[]) if "image" in frozen else post for post in unread]
        unread = [replace(post, ngrams=None) if "ngrams" in frozen else post for post in unread]
        beside = replace(batch_of(*unread), embeddings=cached)
        assert torch.allclose(model(beside), model(whole), atol=1e-5)
        assert not torch.allclose(model(replace(beside, embeddings={})), model(whole), atol=1e-3)


def test_frozen_parts_have_no_dropout() -> None:
    from tiny_models import TAXONOMY

    from crossguard.train.models import build_model
    from crossguard.train.optimizer import freeze
    from crossguard.train.tokenizers import ByteTokenizer

    model = build_model(replace(MODEL, fusion=replace(MODEL.fusion, dropout=0.5)), TAXONOMY, ByteTokenizer(), 0)
    freeze(model, ["text"])
    model.train()
    assert not any(module.training for module in model.text.modules())
    assert model.image.training
    assert model.fusion.training
