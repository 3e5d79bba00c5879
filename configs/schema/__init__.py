"""The typed schema of the whole configuration: one dataclass a group, a sentence above each field."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from crossguard.configs.errors import UserError
from crossguard.configs.schema.build import BuildConfig
from crossguard.configs.schema.checkpoint import CheckpointConfig
from crossguard.configs.schema.checks import at_least
from crossguard.configs.schema.cluster import ClusterConfig
from crossguard.configs.schema.data import DataConfig
from crossguard.configs.schema.evaluation import EvaluationConfig, check_metric
from crossguard.configs.schema.heads import check_heads
from crossguard.configs.schema.launcher import LauncherConfig
from crossguard.configs.schema.model import ModelConfig
from crossguard.configs.schema.taxonomy import TaxonomyConfig
from crossguard.configs.schema.tracker import TrackerConfig
from crossguard.configs.schema.train import TrainConfig
from crossguard.configs.schema.zero import ZeroConfig


@dataclass
class Config:
    """A recipe, resolved."""

    # Name of the recipe.
    recipe: str = ""
    # One sentence about the recipe, shown by `crossguard recipes`.
    description: str = ""
    # Where everything of this job is written.
    run_dir: str = ""
    # The seed of the sample order, of the weights and of every other draw.
    seed: int = 0
    # Ablations: name -> overrides; models trained apart with the same budget on the same shards.
    ablations: dict[str, list[str]] = field(default_factory=dict)
    # The policies.
    taxonomy: TaxonomyConfig = MISSING
    # Where posts come from.
    data: DataConfig = field(default_factory=DataConfig)
    # How posts become shards.
    build: BuildConfig = field(default_factory=BuildConfig)
    # The classifier.
    model: ModelConfig = MISSING
    # Optimisation.
    train: TrainConfig = field(default_factory=TrainConfig)
    # DeepSpeed.
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    # Saving.
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    # Where ranks run.
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    # The machines to plan for.
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    # Experiment tracking.
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    # Measuring.
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        at_least("seed", self.seed, 0)
        policies = [policy.name for policy in self.taxonomy.policies]
        check_metric(self.checkpoint.metric, policies, self.evaluation.metrics)
        if isinstance(self.model, ModelConfig):  # A job that only builds shards describes none.
            check_heads(self.model.heads, policies)
        if self.train.patience and not self.evaluation.every_steps:
            raise UserError("train.patience: needs evaluation.every_steps above 0")
        if self.train.compile and self.zero.stage == 3:
            raise UserError(
                "train.compile: not with zero=3, whose gathering of weights breaks the compiled code to pieces;"
                " use zero=2, or train.compile=false"
            )
        for name, on in (("alignment", self.train.alignment.pairs), ("consistency", self.train.consistency.weight)):
            if on and "text" not in self.model.modalities:
                raise UserError(f"train.{name}: is about texts, which the model does not read (model.modalities)")
        if self.train.consistency.weight and "ngrams" in self.model.modalities:
            raise UserError(
                "train.consistency: not with the modality ngrams, which would see through every disguise: they are read"
                " of the text as it is"
            )
        if not self.data.has_posts and not self.data.shards:
            raise UserError(
                f"data.path: not set; recipe '{self.recipe}' needs data.path=FILE_OR_FOLDER of posts"
                " (or data.shards=DIR built before)"
            )

    @property
    def shards_location(self) -> str:
        """Where build writes and train reads shards: a folder, or a URL that fsspec opens."""
        return self.data.shards or f"{self.run_dir}/shards"


__all__ = [
    "BuildConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "LauncherConfig",
    "ModelConfig",
    "TaxonomyConfig",
    "TrackerConfig",
    "TrainConfig",
    "ZeroConfig",
]
