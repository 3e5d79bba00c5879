"""Masked multi-label losses. A label is violating (1), benign (0), a share of rater votes between, or unknown (NaN).

An unknown label has no loss and no gradient, whatever the logit beside it is. A fractional label y weighs the loss of a
violating post with y and that of a benign one with 1 - y: the expected loss over the raters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from crossguard.configs.errors import UserError
from crossguard.configs.own_parts import load_own, naming
from crossguard.configs.schema.loss import LossConfig

# (logits float[B, P], labels float[B, P]) -> loss of each element, float[B, P].
ElementLoss = Callable[[Tensor, Tensor], Tensor]

# Smallest argument of a logarithm or of a fractional power, whose gradients at 0 are infinite.
TINY = torch.finfo(torch.float32).tiny


def build_loss(config: LossConfig) -> ElementLoss:
    """The loss that a configuration names, masked.

    Returns:
        A function of logits float[B, P] and labels float[B, P] (NaN is unknown) to the loss of each element,
        float32[B, P], 0 where the label is unknown.

    Raises:
        UserError: a loss of the user's own cannot be found, or returns another shape.
    """
    elementwise = _elementwise(config)

    def masked(logits: Tensor, labels: Tensor) -> Tensor:
        known = ~torch.isnan(labels)
        # Masked before as well as after: the gradient of an infinite loss times zero would be NaN.
        logits = torch.where(known, logits.float(), 0.0)
        labels = torch.where(known, labels.float(), 0.0)
        loss = elementwise(logits, labels)
        if loss.shape != labels.shape:
            raise UserError(
                f"train.loss.name={config.name}: returns shape {list(loss.shape)} for logits of shape "
                f"{list(labels.shape)}; return the loss of each element"
            )
        return torch.where(known, loss, 0.0)

    return masked


def bce_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of each element."""
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def focal_loss(logits: Tensor, labels: Tensor, *, gamma: float, alpha: float | None) -> Tensor:
    """Focal loss (arXiv 1708.02002): what is already right weighs little.

    Args:
        logits: float[B, P].
        labels: float[B, P] in [0, 1].
        gamma: focusing exponent; 0 is binary cross-entropy.
        alpha: weight of the violating class, 1 - alpha that of the benign one; None weighs both 1.
    """
    log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)
    # Powers are taken of logarithms: the gradient of 0 ** gamma is infinite for gamma below 1.
    violating = -torch.exp(gamma * log_not_p) * log_p
    benign = -torch.exp(gamma * log_p) * log_not_p
    weight, other = (1.0, 1.0) if alpha is None else (alpha, 1.0 - alpha)
    return weight * labels * violating + other * (1 - labels) * benign


def asymmetric_loss(
    logits: Tensor, labels: Tensor, *, gamma_positive: float, gamma_negative: float, margin: float
) -> Tensor:
    """Asymmetric loss (arXiv 2009.14119): easy benign labels weigh little, and none below a margin.

    Args:
        logits: float[B, P].
        labels: float[B, P] in [0, 1].
        gamma_positive: focusing exponent of violating labels.
        gamma_negative: focusing exponent of benign labels.
        margin: probability below which a benign label has no loss.
    """
    violating = -torch.exp(gamma_positive * F.logsigmoid(-logits)) * F.logsigmoid(logits)
    shifted = (torch.sigmoid(logits) - margin).clamp(min=TINY)
    # 1 - shifted, from sigmoid(-x): 1 - sigmoid(x) is 0 from x = 17 on and would leave the worst errors no gradient.
    rest = (torch.sigmoid(-logits) + margin).clamp(min=TINY, max=1.0)
    benign = -(shifted**gamma_negative) * torch.log(rest)
    return labels * violating + (1 - labels) * benign


def _elementwise(config: LossConfig) -> ElementLoss:
    if config.name == "bce":
        return bce_loss
    if config.name == "focal":
        return lambda logits, labels: focal_loss(logits, labels, gamma=config.gamma, alpha=config.alpha)
    if config.name == "asymmetric":
        return lambda logits, labels: asymmetric_loss(
            logits,
            labels,
            gamma_positive=config.gamma_positive,
            gamma_negative=config.gamma_negative,
            margin=config.margin,
        )
    return naming(load_own(config.name, "train.loss.name"), f"train.loss.name={config.name}")
