"""DeepSpeed: the ZeRO stage and every field of its own configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from crossguard.configs.deepspeed_keys import check_names
from crossguard.configs.deepspeed_owned import check_nvme, check_owned
from crossguard.configs.schema.checks import within


@dataclass
class ZeroConfig:
    """ZeRO (arXiv 1910.02054): what the ranks share out between them."""

    # 0 nothing, 1 optimizer states, 2 gradients as well, 3 parameters as well. Take the lowest that fits.
    stage: int = 1
    # Any key of DeepSpeed's own configuration, e.g. zero.deepspeed.zero_optimization.reduce_bucket_size=5e7.
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        within("zero.stage", self.stage, 0, 3)
        check_names(self.deepspeed)
        check_owned(self.deepspeed)
        check_nvme(self.deepspeed, self.stage)
