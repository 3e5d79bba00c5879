"""Experiment tracking beside metrics.jsonl, which is always written."""

from __future__ import annotations

from dataclasses import dataclass, field

from crossguard.configs.schema.checks import one_of


@dataclass
class TrackerConfig:
    """One W&B run for a job, over all ranks and resumes; no text and no media ever leave for it."""

    # wandb or none.
    name: str = "wandb"
    # W&B project.
    project: str = "crossguard"
    # W&B entity (team); by default that of the API key.
    entity: str | None = None
    # auto (online with an API key, offline without), online or offline.
    mode: str = "auto"
    # Tags of the run.
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        one_of("tracker.name", self.name, ("wandb", "none"))
        one_of("tracker.mode", self.mode, ("auto", "online", "offline"))
