"""A job: a composed configuration and the arguments that its ranks are started with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from crossguard.configs.compose import composition
from crossguard.configs.restarted import without_fresh_start
from crossguard.configs.schema import Config


@dataclass(frozen=True)
class Job:
    """What the stages work on."""

    config: Config
    # `recipe=… key=value …`, as the ranks get them.
    arguments: list[str]

    @classmethod
    def from_arguments(cls, argv: list[str]) -> Job:
        """Compose the configuration; raises UserError when anything is wrong with it."""
        composed = composition(without_fresh_start(argv))
        arguments = [f"recipe={composed.arguments.recipe}", *composed.arguments.overrides]
        return cls(composed.config, arguments)

    @property
    def run_dir(self) -> Path:
        """Where everything of this job is written."""
        return Path(self.config.run_dir)

    @property
    def has_shards(self) -> bool:
        """Whether shards were built."""
        from crossguard.data.shards.folder import has_manifest

        return has_manifest(self.config.shards_location)

    def ablations(self) -> dict[str, Job]:
        """Name -> the job that trains the ablated model on the same shards with the same budget."""
        jobs = {}
        for name, overrides in self.config.ablations.items():
            place = [f"run_dir={self.run_dir / 'ablations' / name}", f"data.shards={self.config.shards_location}"]
            jobs[name] = Job.from_arguments([*self.arguments, *overrides, *place])
        return jobs
