"""The DeepSpeed engine: forward, backward and step under ZeRO 0-3 (arXiv 1910.02054), in fp32 or bf16.

Weights, gradients and moments are fp32 in every stage; bf16 is torch's autocast around the forward pass. So a stage
differs from another in who holds what, never in what is computed.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfigError
from pydantic import ValidationError
from torch import nn

from crossguard.configs.errors import UserError
from crossguard.configs.schema import Config
from crossguard.train import phases
from crossguard.train.deepspeed_settings import deepspeed_config, join_deepspeed
from crossguard.train.gradient_norm import talk_once
from crossguard.train.nvme import open_swap_folder, remove_swap_files
from crossguard.train.optimizer import build_optimizer, freeze
from crossguard.train.ranks import Ranks


class Engine:
    """A model under DeepSpeed.

    Gradients of any number of `backward` calls add up until `step`. DeepSpeed averages gradients over ranks; `backward`
    undoes that, so that the gradient is that of the sum of all losses of all ranks.
    """

    def __init__(self, model: nn.Module, config: Config, ranks: Ranks, micro_batch_size: int):
        """Place `model` (equal on every rank, or shared out by ZeRO-3) on the device and hand it to DeepSpeed.

        Raises:
            UserError: `train.freeze` fits no parameter, `zero.deepspeed` holds a key that crossguard owns, DeepSpeed
                refuses a value, or optimizer states cannot lie where they should (NVMe).
        """
        self.ranks = ranks
        self.stage = config.zero.stage
        self._grad_clip = config.train.grad_clip
        freeze(model, config.train.freeze)
        self.model = model.to(ranks.device)
        self.optimizer = build_optimizer(model, config.train)
        self._norm = torch.zeros((), device=ranks.device)
        if self.stage == 0:
            # DeepSpeed clips without telling the norm here; the gradients are already averaged when the hook runs.
            self.optimizer.register_step_pre_hook(self._clip)
        settings = deepspeed_config(config, ranks.world_size, micro_batch_size)
        join_deepspeed()
        averages = bool(config.train.ema_decay)
        open_swap_folder(settings["zero_optimization"], self.optimizer, ranks, averages=averages)
        try:
            self.deepspeed, _, _, _ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=settings)
        except (ValidationError, DeepSpeedConfigError) as error:
            raise UserError(f"zero.deepspeed: DeepSpeed refuses it ({' '.join(str(error).split())[:200]})") from error
        optimizer = self.deepspeed.optimizer
        self._tells_with_norm = self.stage > 0 and talk_once(optimizer, self.stage, self._talk, ranks.device)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The model's forward pass. Under ZeRO-3 every rank must call it equally often."""
        return self.deepspeed(*inputs, **options)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of this rank's `loss` (a scalar) to those since the last step."""
        self.deepspeed.backward(loss * self.ranks.world_size, scale_wrt_gas=False)

    def step(self, lr: float, told: torch.Tensor | None = None) -> tuple[float, list[float]]:
        """Clip, update the weights at learning rate `lr`, forget the gradients; sum up what the ranks tell each other.

        The first number they tell is a loss. Where its sum or the norm is not finite, gradients are forgotten alike and
        ranks talk as ever, but weights, moments and AdamW's count of updates stay what they are, bit for bit.

        Args:
            lr: learning rate of the groups whose `lr_scale` is 1.
            told: float64[N] of this rank, on its device; by default a loss of 0. It goes with what the ranks tell each
                other about the norm, where they do: a talk costs more than what is told.

        Returns:
            The norm of the gradient of all ranks before clipping, the same on every rank; not finite where a gradient
            is not. And the sums of `told` over all ranks.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._told = torch.zeros(1, dtype=torch.float64, device=self.ranks.device) if told is None else told
        self._talked = False
        if self.stage == 0:  # They are told while the gradients are on their way.
            self._begun = self.ranks.begin_sum(self._told)
        elif not self._tells_with_norm:
            self._talk(self._told[:0])
        self.deepspeed.step()
        if not self._talked:  # Each rank would go on with counts of its own.
            raise RuntimeError("this version of DeepSpeed gets its norm in another way than gradient_norm knows")
        self.optimizer.found_inf = None  # type: ignore[attr-defined]
        norm = self._norm if self.stage == 0 else self.deepspeed.get_global_grad_norm()
        return float(norm), self._told.tolist()

    def train(self, mode: bool = True) -> None:
        """Switch dropout and the like on or off."""
        self.deepspeed.train(mode)

    def close(self) -> None:
        """Remove DeepSpeed's hooks and buffers, and what it has on NVMe. It waits for the device."""
        self.remove_swap_files()
        self.deepspeed.destroy()

    def remove_swap_files(self) -> None:
        """Remove what DeepSpeed has on NVMe: the last thing that is done with the engine. Nobody is waited for."""
        remove_swap_files(self.deepspeed.optimizer)

    def _talk(self, squares: torch.Tensor) -> torch.Tensor:
        """The sums of `squares` over all ranks; and in the same talk, of what they tell each other in this step."""
        sums = self.ranks.sum(torch.cat([squares, self._told]))
        self._hear(sums[len(squares) :])
        return sums[: len(squares)]

    def _hear(self, told: torch.Tensor) -> None:
        """What all ranks together have told."""
        phases.enter(phases.STEP)  # Nobody waits from here on.
        self._told, self._talked = told, True
        if not told[0].isfinite():
            self._hold_update()

    def _clip(self, *_: Any) -> None:
        self._hear(self._begun())
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        limit = self._grad_clip or float("inf")
        self._norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if not self._norm.isfinite():  # Stages 1-3 see to that themselves.
            self._hold_update()

    def _hold_update(self) -> None:
        """Make the next step of the fused AdamW change nothing: it heeds the flag by which torch's GradScaler tells it
        of an overflow."""
        # Made on the CPU: the optimizer copies it to where weights and moments are, which may be the CPU (offload).
        self.optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
