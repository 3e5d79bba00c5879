"""An exponential moving average of the trained weights, which generalises better than the weights of the last step
(Polyak and Juditsky 1992; arXiv 1803.05407).

It is a third moment beside AdamW's two: fp32, held for the same elements by the same rank, moved by the same step. So
it costs 4 bytes an element that a rank updates, lies in checkpoints as they do, and stays where it is when a step is
skipped.
"""

from __future__ import annotations

from typing import Any

import torch

AVERAGE = "average"
MOMENTS = ("exp_avg", "exp_avg_sq")
_DECAY = "ema_decay"


def follow(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Move the averages after each step of `optimizer`, towards the weights by 1 - min(decay, (1 + n) / (10 + n)) at
    update n.

    So the first updates forget the untrained weights sooner; the rule and its constants are those of TensorFlow's
    tf.train.ExponentialMovingAverage with `num_updates`.
    """
    for group in optimizer.param_groups:
        group[_DECAY] = decay
    optimizer.register_step_pre_hook(_begin)
    optimizer.register_step_post_hook(_move)


def is_followed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether averages are kept of what `optimizer` updates."""
    return _DECAY in optimizer.param_groups[0]


def updated_state(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `optimizer` keeps of a tensor that it updates; made here as AdamW would at its first step, and an average
    that begins at the weights."""
    state: dict[str, torch.Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(parameter.data)
        if is_followed(optimizer):
            state[AVERAGE] = parameter.detach().clone()
    return state


def _begin(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Before the first update, when the weights are still those that the average begins at."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            updated_state(optimizer, parameter)


@torch.no_grad()
def _move(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if getattr(optimizer, "found_inf", None) is not None:  # The step is skipped (Engine.step).
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            # On the device, where the number of updates lies: asking for it would wait for the device.
            decay = torch.clamp((1 + state["step"]) / (10 + state["step"]), max=group[_DECAY])
            state[AVERAGE].lerp_(parameter, 1 - decay)
