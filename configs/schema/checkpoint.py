"""When the state is saved and which states are kept."""

from __future__ import annotations

from dataclasses import dataclass

from crossguard.configs.schema.checks import at_least, one_of


@dataclass
class CheckpointConfig:
    """Checkpoints are complete or absent; the last step always has one."""

    # Save every this many steps; 0 saves at the last step (and with each evaluation that is the best so far) alone.
    every_steps: int = 100
    # Write in the background: training waits only while the state is copied to the host's memory, which must hold it.
    async_save: bool = False
    # How many of the newest checkpoints are kept.
    keep_last: int = 2
    # A folder of this run alone, by URL (s3://bucket/run) or path, to which every checkpoint is copied when it is
    # complete; a start takes from there those that the run directory lacks.
    copy_to: str | None = None
    # The metric of the validation evaluation that names the best checkpoint, which is kept, evaluated and exported:
    # a dotted path in metrics.json's split, e.g. macro.average_precision or policies.hate.all.auroc.
    metric: str = "macro.average_precision"
    # Whether a larger or a smaller metric is better: max or min.
    mode: str = "max"

    def __post_init__(self) -> None:
        at_least("checkpoint.every_steps", self.every_steps, 0)
        at_least("checkpoint.keep_last", self.keep_last, 1)
        one_of("checkpoint.mode", self.mode, ("max", "min"))
