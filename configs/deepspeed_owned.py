"""The keys of DeepSpeed's configuration that crossguard sets itself, each with the key to use instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crossguard.configs.errors import UserError

OWNED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size and train.micro_batch_size",
    "managed_gradient_accumulation": "train.batch_size and train.micro_batch_size",
    "gradient_clipping": "train.grad_clip",
    "optimizer": "train.lr, train.betas and train.weight_decay",
    "scheduler": "train.warmup_steps, train.schedule_steps and train.min_lr_ratio",
    "fp16.enabled": "train.precision",
    "bf16.enabled": "train.precision",
    "bfloat16.enabled": "train.precision",
    "torch_autocast.enabled": "train.precision",
    "torch_autocast.dtype": "train.precision",
    "zero_optimization.stage": "zero=0, 1, 2 or 3",
    "zero_optimization.compute_grad_norm": "the default: the norm tells when a gradient is not finite",
}


def check_owned(block: Mapping[str, Any]) -> None:
    """Refuse a key under `zero.deepspeed` that crossguard owns.

    Raises:
        UserError: names the key and crossguard's own key for it.
    """
    for name, instead in OWNED.items():
        if _holds(block, name):
            raise UserError(f"zero.deepspeed.{name}: crossguard sets it; use {instead}")
    # With these DeepSpeed steps a part of the weights with an optimizer of its own.
    for name, only in (("offload_optimizer.ratio", 1), ("offload_optimizer.super_offload", False), ("zenflow", None)):
        if _at(block, f"zero_optimization.{name}") not in (None, only):
            raise UserError(
                f"zero.deepspeed.zero_optimization.{name}: checkpoints cannot see the state of a second optimizer; "
                + ("leave it out" if only is None else f"leave it at {str(only).lower()}")
            )


def check_nvme(block: Mapping[str, Any], stage: int) -> None:
    """Refuse what cannot lie on NVMe under `zero.deepspeed`, or nowhere there.

    Raises:
        UserError: names the key and what to say instead.
    """
    if _at(block, "zero_optimization.offload_param.device") == "nvme":
        raise UserError(
            "zero.deepspeed.zero_optimization.offload_param.device=nvme: checkpoints cannot see weights on NVMe; use"
            " cpu, and nvme for offload_optimizer, which holds three times as much"
        )
    where = "zero_optimization.offload_optimizer"
    if _at(block, f"{where}.device") != "nvme":
        return
    if stage < 3:
        raise UserError(f"zero.deepspeed.{where}.device=nvme: only ZeRO-3 does that; say zero=3, or use cpu")
    if not _at(block, f"{where}.nvme_path"):
        raise UserError(f"zero.deepspeed.{where}.nvme_path: missing; say which folder is on NVMe")


def _holds(block: Mapping[str, Any], path: str) -> bool:
    """Whether the key at a dotted path is there, whatever its value."""
    above, _, name = path.rpartition(".")
    inside = _at(block, above) if above else block
    return isinstance(inside, Mapping) and name in inside


def _at(block: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, or None."""
    value: Any = block
    for name in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value
