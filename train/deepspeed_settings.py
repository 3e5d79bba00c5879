"""What DeepSpeed is told before it begins: its configuration, and that the ranks have met."""

from __future__ import annotations

import copy
from typing import Any

import deepspeed

from crossguard.configs.deepspeed_owned import check_owned
from crossguard.configs.schema import Config
from crossguard.train.nvme import nvme_settings


def deepspeed_config(config: Config, world_size: int, micro_batch_size: int) -> dict[str, Any]:
    """The keys that crossguard owns, with `zero.deepspeed` on top.

    DeepSpeed's own accumulation loses gradients in stages 1 and 2 when `backward` is called twice before `step`
    (0.19.8); the unmanaged one adds them up in every stage.

    Raises:
        UserError: `zero.deepspeed` holds a key that crossguard owns, or asks for NVMe where DeepSpeed cannot write it.
    """
    check_owned(config.zero.deepspeed)
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "train_batch_size": micro_batch_size * world_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.train.grad_clip if config.zero.stage else 0.0,
        "torch_autocast": {"enabled": config.train.precision == "bf16", "dtype": "bfloat16"},
        # The other one stays in torch for good, also for models of other stages.
        "zero_optimization": {"stage": config.zero.stage, "memory_efficient_linear": False},
        "zero_force_ds_cpu_optimizer": False,
    }
    settings = _merged(ours, config.zero.deepspeed)
    zero = settings["zero_optimization"]
    if (zero.get("offload_optimizer") or {}).get("device") == "nvme":
        settings["zero_optimization"] = nvme_settings(zero, config.run_dir, averages=bool(config.train.ema_decay))
    return settings


def join_deepspeed() -> None:
    """Let DeepSpeed find the ranks that torch has joined."""
    # On CPU it would first compile, for a minute, an operator of tensor-parallel inference.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` wins, block by block."""
    merged = copy.deepcopy(below)
    for name, value in above.items():
        both_blocks = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if both_blocks else copy.deepcopy(value)
    return merged
