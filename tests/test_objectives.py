"""Losses against formulas written down independently; unknown labels have no part in them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from crossguard.configs.errors import UserError
from crossguard.configs.schema.loss import LossConfig
from crossguard.train.objectives.losses import build_loss

NAN = float("nan")
CONFIGS = [
    LossConfig("bce"),
    LossConfig("focal", gamma=2.0),
    LossConfig("focal", gamma=0.5, alpha=0.25),
    LossConfig("focal", gamma=0.0, alpha=0.9),
    LossConfig("asymmetric"),
    LossConfig("asymmetric", gamma_positive=1.0, gamma_negative=2.5, margin=0.2),
    LossConfig("asymmetric", gamma_positive=0.0, gamma_negative=0.0, margin=0.0),
    LossConfig("asymmetric", gamma_positive=0.5, gamma_negative=0.5, margin=0.0),
]


def name_of(config: LossConfig) -> str:
    return (
        f"{config.name}-{config.gamma}-{config.alpha}-{config.gamma_positive}-{config.gamma_negative}-{config.margin}"
    )


all_losses = pytest.mark.parametrize("config", CONFIGS, ids=name_of)


def formula(config: LossConfig, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """As the papers write it, in float64: y · loss of a violating post + (1 - y) · loss of a benign one."""
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    if config.name == "bce":
        violating, benign = -np.log(p), -np.log(1 - p)
    elif config.name == "focal":
        weight, other = (1, 1) if config.alpha is None else (config.alpha, 1 - config.alpha)
        violating = -weight * (1 - p) ** config.gamma * np.log(p)
        benign = -other * p**config.gamma * np.log(1 - p)
    else:
        shifted = np.maximum(p - config.margin, 0)
        violating = -((1 - p) ** config.gamma_positive) * np.log(p)
        benign = -(shifted**config.gamma_negative) * np.log(1 - shifted)
    return labels * violating + (1 - labels) * benign


@all_losses
def test_hard_and_soft_labels_agree_with_the_formula(config: LossConfig) -> None:
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 3, (200, 4)).astype(np.float32)
    labels = draw.choice([0.0, 1.0, 0.25, 0.67], (200, 4)).astype(np.float32)
    loss = build_loss(config)(torch.from_numpy(logits), torch.from_numpy(labels))
    assert loss.dtype == torch.float32
    assert loss.shape == (200, 4)
    np.testing.assert_allclose(loss.numpy(), formula(config, logits, labels), rtol=2e-4, atol=1e-6)


@all_losses
def test_gradients_agree_with_differences_of_the_formula(config: LossConfig) -> None:
    draw = np.random.default_rng(1)
    logits = draw.normal(0, 2, (50, 3))
    labels = draw.choice([0.0, 1.0, 0.5], (50, 3))
    inputs = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    build_loss(config)(inputs, torch.tensor(labels)).sum().backward()
    step = 1e-6
    slope = (formula(config, logits + step, labels) - formula(config, logits - step, labels)) / (2 * step)
    assert inputs.grad is not None
    np.testing.assert_allclose(inputs.grad.numpy(), slope, rtol=2e-3, atol=2e-5)


@all_losses
def test_unknown_labels_have_neither_loss_nor_gradient(config: LossConfig) -> None:
    objective = build_loss(config)
    labels = torch.tensor([[1.0, NAN], [NAN, 0.0], [0.3, NAN]])
    known = ~labels.isnan()
    reference = None
    for unknown_logit in (0.0, 1e30, -1e30, float("inf"), NAN):
        logits = torch.where(known, torch.tensor([[0.5, 1.0], [-2.0, 0.1], [3.0, 0.0]]), unknown_logit)
        logits.requires_grad_()
        loss = objective(logits, labels)
        loss.sum().backward()
        assert logits.grad is not None
        assert torch.isfinite(loss).all()
        assert not loss[~known].any()
        assert not logits.grad[~known].any()
        assert torch.isfinite(logits.grad).all()
        assert (logits.grad[known] != 0).all() or config.name == "asymmetric"
        if reference is not None:
            assert torch.equal(loss, reference[0])
            assert torch.equal(logits.grad, reference[1])
        reference = loss.detach(), logits.grad
    assert not objective(torch.randn(2, 2), torch.full((2, 2), NAN)).any()


@all_losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite_and_the_worst_errors_still_teach(config: LossConfig, dtype: torch.dtype) -> None:
    logits = torch.tensor([0.0, 1e-6, 16.0, 17.0, 40.0, 89.0, 200.0, 1e4, 1e8])
    logits = torch.cat([logits, -logits]).to(dtype)[:, None].expand(-1, 3).clone().requires_grad_()
    labels = torch.tensor([0.0, 0.5, 1.0]).expand(len(logits), 3)
    loss = build_loss(config)(logits, labels)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logits.grad).all()
    assert (loss >= 0).all()
    # Surely benign and called violating at logit 40, and the other way round. Asymmetric loss with a margin forgives
    # a little of the first: 1 - p + margin has no slope left.
    wrongly_benign = logits.grad[9 + 4, 2]
    assert wrongly_benign < -0.05
    if config.name != "asymmetric" or config.margin == 0:
        assert logits.grad[4, 0] > 0.05


def test_asymmetric_loss_forgives_benign_posts_below_the_margin() -> None:
    objective = build_loss(LossConfig("asymmetric", margin=0.1))
    logits = torch.tensor([[-3.0, -2.0]], requires_grad=True)
    loss = objective(logits, torch.zeros(1, 2))
    loss.sum().backward()
    assert logits.grad is not None
    assert loss[0, 0] == 0
    assert loss[0, 1] > 0
    assert logits.grad[0].tolist()[0] == 0


def test_focal_loss_without_focus_is_cross_entropy() -> None:
    logits, labels = torch.randn(20, 2), torch.rand(20, 2)
    bce = build_loss(LossConfig("bce"))(logits, labels)
    for config in (LossConfig("focal", gamma=0.0), CONFIGS[-2]):
        torch.testing.assert_close(build_loss(config)(logits, labels), bce, rtol=1e-5, atol=1e-6)


OWN_MODULE = """
def squared(logits, labels):
    assert not labels.isnan().any()
    return (logits.sigmoid() - labels) ** 2

def averaged(logits, labels):
    return squared(logits, labels).mean()

def broken(logits, labels):
    return logits @ labels
"""


def test_a_loss_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_losses_of_test.py").write_text(OWN_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_losses_of_test", raising=False)
    logits: Tensor = torch.tensor([[0.0, 5.0]], requires_grad=True)
    loss = build_loss(LossConfig("my_losses_of_test:squared"))(logits, torch.tensor([[1.0, NAN]]))
    loss.sum().backward()
    assert loss.tolist() == [[0.25, 0.0]]
    assert logits.grad is not None
    assert logits.grad[0, 1] == 0
    averaged = build_loss(LossConfig("my_losses_of_test:averaged"))
    with pytest.raises(
        UserError, match=r"train\.loss\.name=my_losses_of_test:averaged: returns shape \[\] .* each element"
    ):
        averaged(logits, torch.zeros(1, 2))
    with pytest.raises(
        UserError, match=r"name=my_losses_of_test:broken: raised RuntimeError at my_losses_of_test.py:10 \("
    ):
        build_loss(LossConfig("my_losses_of_test:broken"))(logits, torch.zeros(1, 2))
    with pytest.raises(UserError, match=r"train\.loss\.name=.*:squarred: .* did you mean 'squared'"):
        build_loss(LossConfig("my_losses_of_test:squarred"))
    with pytest.raises(UserError, match=r"train\.loss\.name=fokal: .*focal"):
        LossConfig("fokal")
