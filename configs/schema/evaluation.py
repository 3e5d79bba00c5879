"""What is measured, when, and on how much data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from crossguard.configs.errors import UserError
from crossguard.configs.schema.actions import ALLOW, DEFAULT_ACTIONS, ActionConfig
from crossguard.configs.schema.checks import above, at_least, one_of
from crossguard.configs.schema.train import ATTACKS
from crossguard.configs.suggest import allowed

CALIBRATIONS = ("auto", "none", "temperature", "platt", "isotonic")
REFERENCES = ("tfidf_logistic_regression",)
METRICS = ("average_precision", "auroc", "recall_at_precision_90")

# What a cell of metrics.json says beside its metrics.
COUNTS = ("n", "positives", "insufficient", "intervals")

# Fields of a post that slices may name; those that end in a dot are objects, and a key follows.
SLICE_FIELDS = (
    "language",
    "modality",
    "region",
    "source",
    "licence",
    "group",
    "created_at",
    "consent",
    "meta.",
    "severity.",
)


@dataclass
class EvaluationConfig:
    """Evaluation counts known labels only."""

    # Evaluate on the validation split every this many steps; 0 leaves it out.
    every_steps: int = 0
    # At most this many validation posts during training (the final evaluation takes all); by default all.
    max_validation_posts: int | None = None
    # Splits of the final evaluation; by default every one but train.
    splits: list[str] | None = None
    # Posts in a forward pass of a rank.
    batch_size: int = 64
    # A cell (policy, or policy × language) with fewer positives or fewer negatives is reported as insufficient.
    min_positives: int = 10
    # Beside languages, the groups that every metric is computed for: fields of the post (region, modality, source,
    # meta.KEY, severity.POLICY, …), several joined by + for their combinations.
    slices: list[str] = field(default_factory=lambda: ["region", "modality", "language+region+modality"])
    # How scores become probabilities, per policy and language, from the validation split: temperature, platt,
    # isotonic, auto for the one that predicts held-out validation posts best, or none.
    calibration: str = "auto"
    # Action -> what it promises, the most severe first; by default {remove: {precision: 0.95}, human_review: {recall:
    # 0.8}}. Each policy and language gets its own threshold, or none where the validation posts cannot support the
    # promise. `allow` is what is left.
    actions: dict[str, ActionConfig] = field(default_factory=dict)
    # Further metrics of your own, `module:function` with (labels, scores) -> float; reported under the function's name.
    metrics: list[str] = field(default_factory=list)
    # An earlier run's directory to compare with: `crossguard evaluate` fails (status 1) where a group got worse.
    against: str | None = None
    # How much worse, in average precision or AUROC, a group may get; beyond that, and beyond chance, it counts.
    margin: float = 0.02
    # A functional suite: a file of posts with the function that each tests under meta.functionality (HateCheck's way).
    suite: str | None = None
    # Families of text attacks (see train.attacks.families) under each of which the test split is scored once more, with
    # the model and with every ablation: how far recall falls and how far benign posts are flagged more often.
    attacks: list[str] = field(default_factory=list)
    # At most this many posts of the test split under each family; by default all.
    max_attacked_posts: int | None = None
    # For the curves of review budgets: what acting on a benign post costs, in any unit.
    false_positive_cost: float = 1.0
    # For the same curves: what missing a violation costs.
    false_negative_cost: float = 1.0
    # Put the texts of the worst errors into the report, folded away; it then repeats what posts say, wherever it goes.
    show_texts: bool = False
    # Also score the test split with every choice of modalities withheld: what each adds, and what is left without it.
    modality_subsets: bool = False
    # Simple models fitted on the same training split and shown beside: tfidf_logistic_regression.
    references: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        at_least("evaluation.every_steps", self.every_steps, 0)
        at_least("evaluation.max_validation_posts", self.max_validation_posts, 1)
        at_least("evaluation.max_attacked_posts", self.max_attacked_posts, 1)
        at_least("evaluation.batch_size", self.batch_size, 1)
        at_least("evaluation.min_positives", self.min_positives, 1)
        at_least("evaluation.margin", self.margin, 0)
        above("evaluation.false_positive_cost", self.false_positive_cost, 0)
        above("evaluation.false_negative_cost", self.false_negative_cost, 0)
        for name in slice_fields(self.slices):
            whole, _, key = name.partition(".")
            if (f"{whole}." if key else name) not in SLICE_FIELDS:
                raise UserError(
                    f"evaluation.slices: '{name}': {allowed(name, SLICE_FIELDS)} (meta.KEY, severity.POLICY)"
                )
        for name in self.references:
            one_of("evaluation.references", name, REFERENCES)
        for name in self.attacks:
            one_of("evaluation.attacks", name, ATTACKS)
        one_of("evaluation.calibration", self.calibration, CALIBRATIONS)
        for name in self.actions:
            if name == ALLOW or not name.isidentifier():
                raise UserError(f"evaluation.actions.{name}: choose another name, of letters, digits and underscores")
        taken = [*METRICS, *COUNTS]
        for spec in self.metrics:
            name = spec.partition(":")[2]
            if not name:
                raise UserError(f"evaluation.metrics: '{spec}': write module:function")
            if name in taken:
                raise UserError(f"evaluation.metrics: {spec}: the name '{name}' is taken; rename the function")
            taken.append(name)

    @property
    def targets(self) -> dict[str, ActionConfig]:
        """Action -> what it promises, the most severe first."""
        return self.actions or DEFAULT_ACTIONS


def slice_fields(slices: Iterable[str]) -> list[str]:
    """The fields that slices are made of, each once."""
    return list(dict.fromkeys(name for slice_name in slices for name in slice_name.split("+")))


def check_metric(path: str, policies: list[str], own: list[str]) -> None:
    """Whether `checkpoint.metric` can name a number of an evaluation.

    Args:
        path: macro.METRIC, macro_policy_language.METRIC, policies.POLICY.all.METRIC or
            policies.POLICY.by_language.LANGUAGE.METRIC.
        policies: the taxonomy's.
        own: the user's metrics, `module:function`.
    """
    start, _, metric = path.rpartition(".")
    parts = start.split(".")
    one_of("checkpoint.metric", metric, (*METRICS, *(spec.partition(":")[2] for spec in own)))
    if start not in ("macro", "macro_policy_language"):
        if parts[0] != "policies" or len(parts) < 3 or not (parts[2:] == ["all"] or parts[2] == "by_language"):
            raise UserError(
                f"checkpoint.metric={path}: write macro.METRIC, macro_policy_language.METRIC,"
                " policies.POLICY.all.METRIC or policies.POLICY.by_language.LANGUAGE.METRIC"
            )
        one_of(f"checkpoint.metric={path}: policy", parts[1], policies)
