"""What is minimised: the loss of the labels, and terms beside it."""

from __future__ import annotations

from dataclasses import dataclass, field

from crossguard.configs.errors import UserError
from crossguard.configs.schema.checks import above, at_least, one_of, within

LOSSES = ("bce", "focal", "asymmetric")
BALANCED = ("class", "language")


@dataclass
class LogitAdjustmentConfig:
    """The log odds of a violation among the training labels, added to the logits in the loss alone (arXiv 2007.07314):
    the model learns what remains, so that rare policies are not scored low for being rare."""

    # How much of them is added; 0 is off, 1 is all.
    tau: float = 0.0
    # Take those of the policy in the post's language, in place of those of the policy.
    by_language: bool = False

    def __post_init__(self) -> None:
        at_least("train.loss.logit_adjustment.tau", self.tau, 0)


@dataclass
class BalanceConfig:
    """Weights by which rare labels count more; their mean over the labels of the training split is 1."""

    # What is evened out: class (violating and benign labels of each policy), language, or both.
    by: list[str] = field(default_factory=list)
    # A label of one of n counts n^-exponent; with 1 all classes, or languages, count alike in total.
    exponent: float = 1.0
    # Take the effective number of n labels, (1 - beta^n) / (1 - beta), in place of n (arXiv 1901.05555); by default n.
    beta: float | None = None

    def __post_init__(self) -> None:
        for name in self.by:
            one_of("train.loss.balance.by", name, BALANCED)
        at_least("train.loss.balance.exponent", self.exponent, 0)
        if self.beta is not None and not 0 <= self.beta < 1:
            raise UserError(f"train.loss.balance.beta={self.beta}: a number in [0, 1)")


@dataclass
class GroupDroConfig:
    """Group distributionally robust optimisation (arXiv 1911.08731): languages with a large loss get more weight."""

    # How fast the weights of the languages follow their losses: after a step each grows by exp(step_size x loss);
    # 0 is off.
    step_size: float = 0.0
    # Adds adjustment / sqrt(posts of the language) to its loss when weights grow, since few posts are learned by heart.
    adjustment: float = 0.0

    def __post_init__(self) -> None:
        at_least("train.loss.group_dro.step_size", self.step_size, 0)
        at_least("train.loss.group_dro.adjustment", self.adjustment, 0)


@dataclass
class LossConfig:
    """A masked loss: unknown labels take no part in it."""

    # bce, focal (arXiv 1708.02002), asymmetric (arXiv 2009.14119), or `module:function` of your own.
    name: str = "bce"
    # Focusing exponent of the focal loss.
    gamma: float = 2.0
    # Weight of positives in the focal loss; benign labels weigh one minus it. By default both weigh 1.
    alpha: float | None = None
    # Focusing exponent of the asymmetric loss for positives.
    gamma_positive: float = 0.0
    # Focusing exponent of the asymmetric loss for negatives.
    gamma_negative: float = 4.0
    # Probability margin below which the asymmetric loss ignores negatives.
    margin: float = 0.05
    # What the levels of a policy's severity weigh together, where its label weighs 1.
    severity_weight: float = 1.0
    # Priors of the policies.
    logit_adjustment: LogitAdjustmentConfig = field(default_factory=LogitAdjustmentConfig)
    # Weights of the labels.
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    # Weights of the languages that follow their losses.
    group_dro: GroupDroConfig = field(default_factory=GroupDroConfig)

    def __post_init__(self) -> None:
        one_of("train.loss.name", self.name, LOSSES, or_own=True)
        within("train.loss.alpha", self.alpha, 0, 1)
        within("train.loss.margin", self.margin, 0, 1)
        for name in ("gamma", "gamma_positive", "gamma_negative", "severity_weight"):
            at_least(f"train.loss.{name}", getattr(self, name), 0)
        if self.group_dro.step_size and "language" in self.balance.by:
            raise UserError(
                "train.loss.group_dro: weighs the languages, as train.loss.balance.by=[language] does; choose one"
            )


@dataclass
class DistillConfig:
    """Learning from the scores of a teacher (arXiv 1503.02531)."""

    # The teacher's predictions on training posts, as `crossguard predict` or `evaluate` writes them; posts are matched
    # by id, and one that is not in it has no such term.
    predictions: str | None = None
    # Weight of the term beside the loss of the labels.
    weight: float = 1.0
    # Both models' logits are divided by it; above 1, small differences between scores near 0 or 1 count less.
    temperature: float = 2.0
    # Where a label is unknown, take the teacher's score as a fractional label.
    fill_unknown: bool = False

    def __post_init__(self) -> None:
        at_least("train.distill.weight", self.weight, 0)
        above("train.distill.temperature", self.temperature, 0)
        if self.fill_unknown and self.predictions is None:
            raise UserError("train.distill.fill_unknown: set train.distill.predictions, which holds the scores")
        if self.predictions is not None and not (self.weight or self.fill_unknown):
            raise UserError("train.distill.predictions: nothing uses it; set train.distill.weight or fill_unknown")


@dataclass
class AlignmentConfig:
    """Translations read alike: of each text, its own translation is told from the others of the step by the text
    encoder's summaries (symmetric InfoNCE, arXiv 1807.03748 and 2103.00020)."""

    # JSON lines of pairs, {"id": …, "a": text, "b": its translation}.
    pairs: str | None = None
    # Weight of the term beside the loss of the labels.
    weight: float = 0.1
    # Pairs in a step, over all ranks; they are one another's negatives, and are read beside the first micro-batch.
    batch_size: int = 32
    # What cosines are divided by.
    temperature: float = 0.05

    def __post_init__(self) -> None:
        above("train.alignment.weight", self.weight, 0)
        above("train.alignment.temperature", self.temperature, 0)
        at_least("train.alignment.batch_size", self.batch_size, 2)


@dataclass
class ConsistencyConfig:
    """The same scores for a text and a disguise of it, drawn anew each time from `train.attacks.families`."""

    # Weight of the term beside the loss of the labels; 0 is off. Each text is read twice, which nearly doubles a step
    # of text alone. A disguise that the normaliser takes off again teaches nothing.
    weight: float = 0.0

    def __post_init__(self) -> None:
        at_least("train.consistency.weight", self.weight, 0)
