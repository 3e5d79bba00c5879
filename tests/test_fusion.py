"""Fusion of any number of modalities: what each kind can and cannot say about their combination."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import BOTH, NEITHER, ONLY_IMAGES, ONLY_TEXT, POSTS, batch_of, build, model_config, post
from torch import Tensor

from crossguard.configs.errors import UserError
from crossguard.configs.schema.fusion import FusionConfig
from crossguard.configs.schema.heads import HeadConfig
from crossguard.train.models import Classifier
from crossguard.train.models.attention import Block, CrossBlock
from crossguard.train.models.fusion import build_fusion
from crossguard.train.models.tokens import Tokens, summarise
from crossguard.train.models.withheld import Withheld

KINDS: dict[str, dict[str, Any]] = {
    "late": {"kind": "late"},
    "gated": {"kind": "gated"},
    "cross": {"kind": "cross"},
    "joint": {"kind": "joint"},
    "product": {"kind": "joint", "layers": 0},
    "bottleneck": {"kind": "joint", "layers": 2, "bottleneck": 2},
}


def model_of(kind: str) -> Classifier:
    return build(replace(model_config(), fusion=FusionConfig(**{"width": 16, "heads": 2, **KINDS[kind]})))


@pytest.mark.parametrize("kind", KINDS)
def test_a_post_s_logits_are_its_own_and_all_parameters_learn(kind: str) -> None:
    model = model_of(kind)
    with torch.no_grad():
        alone = torch.cat([model(batch_of(one)) for one in POSTS])
        assert (model(batch_of(*POSTS)) - alone).abs().max() <= 1e-5
    assert torch.pdist(alone).min() > 1e-4
    for posts in ([BOTH], [ONLY_TEXT, NEITHER], [ONLY_IMAGES, NEITHER]):
        model.zero_grad(set_to_none=True)
        model(batch_of(*posts)).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_late_fusion_alone_adds_up_what_each_modality_says(kind: str) -> None:
    """f(text, image) + f(neither) = f(text) + f(image), for whatever weights: that is what no interaction means."""
    model = model_of(kind)
    torch.manual_seed(1)
    for parameter in model.fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    posts = batch_of(*(post(number, 7, 1) for number in range(8)))
    with torch.no_grad():
        parts = [Withheld(model, names)(posts) for names in ((), ("text", "image"), ("image",), ("text",))]
    interaction = (parts[0] + parts[1] - parts[2] - parts[3]).abs()
    assert interaction.max() < 1e-5 if kind == "late" else interaction.amax(0).min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_withheld_modality_is_one_that_no_post_has(kind: str) -> None:
    model = model_of(kind)
    posts = [post(number, 4 + number, 1 + number % 2) for number in range(4)]
    with torch.no_grad():
        for name, bare in (("text", {"input_ids": None}), ("image", {"images": []})):
            without = model(batch_of(*(replace(one, **bare) for one in posts)))
            assert (Withheld(model, [name])(batch_of(*posts)) - without).abs().max() < 1e-5
            assert (model(batch_of(*posts)) - without).abs().amax(1).min() > 1e-4


def tokens(number: int, length: int, width: int, present: list[bool]) -> Tokens:
    values = torch.randn(len(present), length, width, generator=torch.Generator().manual_seed(number))
    mask = torch.ones(len(present), length, dtype=torch.bool)
    return Tokens(values, mask, summarise(values, mask, "mean"), torch.tensor(present))


@pytest.mark.parametrize("kind", KINDS)
def test_all_but_late_fusion_learn_a_combination(kind: str) -> None:
    """Whether two modalities agree, where each of them alone says nothing."""
    torch.manual_seed(0)
    fusion = build_fusion(FusionConfig(**{"width": 16, "heads": 2, **KINDS[kind]}), {"text": 8, "image": 8})
    head = torch.nn.Linear(fusion.output_width, 1)
    optimizer = torch.optim.AdamW([*fusion.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(120):
        said = torch.randint(2, (2, 128)) * 2 - 1
        given = {}
        for name, sign in zip(("text", "image"), said, strict=True):
            values = torch.randn(128, 6, 8)
            values[:, :, 0] += sign[:, None]
            mask = torch.ones(128, 6, dtype=torch.bool)
            given[name] = Tokens(values, mask, values.mean(1), mask[:, 0])
        logits, agree = head(fusion(given))[:, 0], (said[0] == said[1]).float()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, agree)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = ((logits > 0) == agree.bool()).float().mean().item()
    assert right < 0.65 if kind == "late" else right > 0.85


@pytest.mark.parametrize(("kind", "heard"), [("cross", (0, 1)), ("joint", (0, 0)), ("bottleneck", (1, 2))])
def test_attention_hears_of_the_tokens_of_the_other_modality(kind: str, heard: tuple[int, int]) -> None:
    """What comes of it for text and for image (`heard`: their places in the output) changes with the other's tokens,
    though the other's summary is what it was."""
    torch.manual_seed(0)
    fusion = build_fusion(FusionConfig(**{"width": 16, "heads": 2, **KINDS[kind]}), {"text": 8, "image": 8})
    fusion.norm = torch.nn.Identity()  # It would spread every change.
    given = {name: tokens(number, 5, 8, [True, True]) for number, name in enumerate(("text", "image"))}
    with torch.no_grad():
        before = fusion(given).unflatten(1, (-1, 16))
        for place, other in zip(heard, ("image", "text"), strict=True):
            changed = replace(given[other], values=given[other].values.flip(2))
            after = fusion({**given, other: changed}).unflatten(1, (-1, 16))
            assert (after - before)[:, place].abs().amax(1).min() > 1e-4, other


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_modalities(kind: str) -> None:
    """Each one counts where it is there, and not at all where it is not."""
    config = FusionConfig(**{"width": 16, "heads": 2, **KINDS[kind]})
    for names in (["audio"], ["text", "image", "video"], ["text", "image", "video", "audio"]):
        torch.manual_seed(0)
        fusion = build_fusion(config, {name: 8 + number for number, name in enumerate(names)})
        given = {name: tokens(number, 3 + number, 8 + number, [True, True]) for number, name in enumerate(names)}

        def fuse(given: dict[str, Tokens], fusion: Any = fusion) -> Tensor:
            with torch.no_grad():
                return fusion(given)

        whole = fuse(given)
        assert whole.shape == (2, fusion.output_width)
        for number, name in enumerate(names):
            other = tokens(99, 3 + number, 8 + number, [True, True])
            changed = fuse({**given, name: other}) - whole
            assert changed.abs().amax(1).min() > 1e-4, name
            absent = [replace(one, present=torch.tensor([True, False])) for one in (given[name], other)]
            lost, lost_other = (fuse({**given, name: one}) for one in absent)
            assert (lost[0] - whole[0]).abs().max() < 1e-6 < 1e-4 < (lost[1] - whole[1]).abs().max(), name
            assert torch.equal(lost[1], lost_other[1]), name


def test_a_last_layer_computes_what_is_read_and_that_is_the_same() -> None:
    torch.manual_seed(0)
    block, cross = Block(FusionConfig(width=16, heads=2)), CrossBlock(FusionConfig(width=16, heads=2))
    values, mask = torch.randn(3, 7, 16), torch.arange(7) < torch.tensor([[7], [5], [2]])
    with torch.no_grad():
        for whole, part in (
            (block(values, mask), block(values, mask, 2)),
            (cross(values, values, mask), cross(values[:, :2], values, mask)),
        ):
            assert part.shape == (3, 2, 16)
            assert (whole[:, :2] - part).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "gatet"}, r"model\.fusion\.kind=gatet: did you mean 'gated'\?"),
        ({"kind": "cross", "layers": 0}, r"model\.fusion\.layers=0: model\.fusion\.kind=cross needs at least 1"),
        ({"kind": "late", "bottleneck": 4}, r"bottleneck=4: only with model\.fusion\.kind=joint"),
        ({"bottleneck": 4}, r"layers=1: model\.fusion\.bottleneck needs at least 2"),
    ],
)
def test_what_makes_no_sense_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FusionConfig(**values)


def test_late_fusion_takes_no_hidden_layer_which_would_mix() -> None:
    with pytest.raises(UserError, match=r"model\.heads\.main\.hidden=8: model\.fusion\.kind=late adds up"):
        replace(model_config(), fusion=FusionConfig(kind="late"), heads={"main": HeadConfig(["spam", "insult"], 8)})
