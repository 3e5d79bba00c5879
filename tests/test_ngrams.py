"""The tower of character n-grams: what it counts, alone and beside other towers, whatever a batch lacks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import POSTS, TAXONOMY, batch_of, build, model_config

from crossguard.configs.compose import compose
from crossguard.configs.errors import UserError
from crossguard.configs.schema.encoders import TextEncoderConfig
from crossguard.configs.schema.heads import HeadConfig
from crossguard.configs.schema.model import ModelConfig
from crossguard.configs.schema.ngrams import NgramsConfig
from crossguard.data.curation.attacks import TextAttacks
from crossguard.data.loading.encoded import EncodedSample
from crossguard.data.loading.ngrams import FINISH, OFFSET, PRIME, hashed_ngrams
from crossguard.data.loading.sample import RawSample
from crossguard.train.encode import PostEncoder
from crossguard.train.models import build_model
from crossguard.train.models.modality_dropout import drop_modalities
from crossguard.train.models.ngrams import SCALE
from crossguard.train.tokenizers import load_tokenizer

SMALL = NgramsConfig(buckets=500, width=8)


def spelled_out(text: str, shortest: int, longest: int) -> list[str]:
    """What fastText finds, one by one."""
    words = f" {' '.join(text.lower().split())} "
    return [
        piece
        for length in range(shortest, longest + 1)
        for start in range(len(words) - length + 1)
        if " " not in (piece := words[start : start + length])[1:-1] and piece.strip()
    ]


def hashed(piece: str) -> int:
    """FNV-1a of its characters, mixed."""
    number = int(OFFSET)
    for character in piece:
        number = (number ^ ord(character)) * int(PRIME) % (1 << 64)
    number = (number ^ number >> 33) * int(FINISH) % (1 << 64)
    return number ^ number >> 33


@pytest.mark.parametrize("text", ["Meet me  at\nthe", "", " \t", "х", "你好 世界 😀x", "a b", "\ud800x"])
@pytest.mark.parametrize(("shortest", "longest"), [(1, 3), (2, 5), (5, 9)])
def test_ngrams_are_those_inside_words(text: str, shortest: int, longest: int) -> None:
    pieces = spelled_out(text.encode("utf-8", "replace").decode(), shortest, longest)
    ids = hashed_ngrams(text, shortest, longest, (1 << 31) - 1)
    assert ids.dtype == np.int32
    assert ids.tolist() == sorted({hashed(piece) % ((1 << 31) - 1) for piece in pieces})
    assert len(ids) == len(set(pieces))


def test_ids_never_change_and_spread_over_the_table() -> None:
    # Written down once: a table that was trained yesterday is read with the same ids tomorrow.
    assert hashed_ngrams("Añ", 1, 3, 1000).tolist() == [143, 219, 293, 429, 659, 824, 874]
    distinct = hashed_ngrams(" ".join(f"{number:x}" for number in range(3000)), 2, 5, 1 << 30)
    filled = np.bincount(distinct % 64, minlength=64)
    assert filled.min() > 0.7 * filled.mean()
    assert filled.max() < 1.3 * filled.mean()


def with_ngrams(post: EncodedSample) -> EncodedSample:
    """The same post, its n-grams made of its tokens."""
    if post.input_ids is None:
        return post
    return replace(post, ngrams=np.unique(post.input_ids[1:] * 7 % SMALL.buckets).astype(np.int32))


READ = [with_ngrams(post) for post in POSTS]
TOGETHER = [["ngrams"], ["text", "ngrams"], ["ngrams", "image"], ["text", "ngrams", "image"]]


@pytest.mark.parametrize("modalities", TOGETHER, ids="+".join)
def test_logits_depend_on_no_neighbour_and_every_parameter_learns(modalities: list[str]) -> None:
    model = build(replace(model_config(), modalities=modalities, ngrams=SMALL))
    torch.nn.init.normal_(model.ngrams.table.weight)
    batch = batch_of(*READ)
    with torch.no_grad():
        together = model(batch)
        alone = torch.cat([model(batch_of(post)) for post in READ])
        assert (together - alone).abs().max() <= 1e-5
        without = model(batch_of(*[replace(post, ngrams=None) for post in READ]))
    # Who has text is told apart by it, and nobody else.
    moved = (together - without).abs().amax(1) > 1e-6
    assert moved.tolist() == [post.ngrams is not None and len(post.ngrams) > 0 for post in READ]
    model.train()
    for posts in (READ[:1], [READ[1], READ[4]], [READ[2], READ[4]]):
        model.zero_grad(set_to_none=True)
        model(batch_of(*posts)).square().sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        has_text = any(post.ngrams is not None for post in posts)
        assert bool(model.ngrams.table.weight.grad.any()) == has_text


def test_what_was_never_seen_says_nothing_and_no_fusion_changes_what_was() -> None:
    """A fresh table leaves every policy at one half; trained, it moves logits by the same in front of any fusion."""
    batch = batch_of(*READ)
    moved = []
    for kind in ("late", "joint"):
        config = replace(model_config(), modalities=["text", "ngrams"], ngrams=SMALL)
        config = replace(config, fusion=replace(config.fusion, kind=kind))
        fresh, model = build_model(config, TAXONOMY, load_tokenizer(config.text), 1).eval(), build(config)
        with torch.no_grad():
            assert not fresh(batch).any()
            before = model(batch)
            model.ngrams.table.weight.normal_(generator=torch.Generator().manual_seed(0))
            model.heads.main.logits.weight[:, -SMALL.width :] = torch.eye(2, SMALL.width)
            moved.append(model(batch) - before)
            vectors = model.ngrams.table.weight[torch.from_numpy(READ[0].ngrams)]
        assert torch.allclose(moved[-1][0], SCALE * (vectors.sum(0) / len(vectors) ** 0.5)[:2], atol=1e-4)
    assert torch.allclose(moved[0], moved[1], atol=1e-4)


def test_a_dropped_text_takes_its_ngrams_along() -> None:
    model = build(replace(model_config(), modalities=["text", "ngrams", "image"], ngrams=SMALL))
    both = [replace(post, images=READ[0].images) for post in READ if post.ngrams is not None]
    batch = batch_of(*both)
    with torch.no_grad():
        dropped = drop_modalities(model.read(batch), torch.arange(len(both)), 1.0, seed=1)
    lost = ~dropped["text"].present
    assert lost.any()
    assert not lost.all()
    assert torch.equal(dropped["ngrams"].present, dropped["text"].present)
    assert torch.equal(dropped["image"].present, lost)


def encoder(attacks: TextAttacks | None = None, **text: object) -> PostEncoder:
    config = ModelConfig(modalities=["ngrams"], text=TextEncoderConfig(**text))  # type: ignore[arg-type]
    return PostEncoder(config, TAXONOMY, attacks=attacks)


def test_posts_are_read_without_a_tokenizer_and_without_their_disguise() -> None:
    def ids(encode: PostEncoder, text: str | None, position: int = -1) -> list[int] | None:
        sample = encode(RawSample({"id": "a", "labels": {}}, text=text), position)
        assert sample.input_ids is None
        return None if sample.ngrams is None else sample.ngrams.tolist()

    plain, undoing = encoder(), encoder(normaliser=2)
    assert ids(plain, None) is None
    assert ids(plain, "h.a.t.e") != ids(plain, "hate")
    assert ids(undoing, "h.a.t.e") == ids(undoing, "hate") == ids(plain, "hate")
    assert ids(plain, "x" * 1000 + "y") == ids(plain, "x" * 1000)
    attacked = encoder(TextAttacks(1.0, ("zero_width",), seed=0))
    assert ids(attacked, "hate speech", position=3) != ids(plain, "hate speech") == ids(attacked, "hate speech")
    # What decides the numbers decides the fingerprint.
    config = ModelConfig(modalities=["ngrams"])
    other = replace(config, ngrams=replace(config.ngrams, max_n=6))
    assert PostEncoder(config, TAXONOMY).fingerprint != PostEncoder(other, TAXONOMY).fingerprint


def test_the_configuration_is_checked() -> None:
    with pytest.raises(UserError, match=r"model\.ngrams\.max_n=1: must be at least model\.ngrams\.min_n=2"):
        compose(["recipe=memes", "data.path=x", "model=ngrams", "model.ngrams.min_n=2", "model.ngrams.max_n=1"])
    with pytest.raises(UserError, match=r"model\.ngrams\.buckets=0: a number from 1"):
        compose(["recipe=memes", "data.path=x", "model=ngrams", "model.ngrams.buckets=0"])
    with pytest.raises(UserError, match=r"model\.heads\.main\.hidden=8: n-grams are added"):
        ModelConfig(modalities=["ngrams"], heads={"main": HeadConfig(["hate"], hidden=8)})
    compose(["recipe=memes", "data.path=x", "model=ngrams", "train.freeze=[ngrams.table.weight]"])
    beside = compose(["recipe=memes", "data.path=x", "model=multilingual_e5_small_ngrams"]).model
    assert list(beside.encoders) == ["text"]


def test_a_plan_counts_the_table() -> None:
    from crossguard.train.planning.shapes import Shapes

    shapes = Shapes(compose(["recipe=multilingual_text", "data.path=x", "model=ngrams"]))
    assert shapes.trace(3).posts == 3
    table = 131072 * 16
    assert table <= sum(parameter.numel() for parameter in shapes.model.parameters()) < 1.1 * table
