"""Optimisation: steps, batches, learning rate, loss."""

from __future__ import annotations

from dataclasses import dataclass, field

from crossguard.configs.errors import UserError
from crossguard.configs.schema.checks import above, at_least, one_of, within
from crossguard.configs.schema.loss import AlignmentConfig, ConsistencyConfig, DistillConfig, LossConfig

PRECISIONS = ("fp32", "bf16")
# What data/curation/attacks.py can do to a text.
ATTACKS = (
    "leetspeak",
    "homoglyphs",
    "zero_width",
    "repetition",
    "separation",
    "marks",
    "compatibility_forms",
    "swaps",
)


@dataclass
class TextAttacksConfig:
    """Disguises that some of the texts get while training."""

    # Share of the texts that get one; 0 is off.
    probability: float = 0.0
    # The kinds of disguise to draw from.
    families: list[str] = field(default_factory=lambda: list(ATTACKS))
    # Whether a post looks the same whenever it comes, in its disguise or in none, as train.cache_embeddings needs it;
    # by default it is drawn anew each time.
    once: bool = False

    def __post_init__(self) -> None:
        within("train.attacks.probability", self.probability, 0, 1)
        for name in self.families:
            one_of("train.attacks.families", name, ATTACKS)
        if not self.families:
            raise UserError(f"train.attacks.families: empty; allowed: {', '.join(ATTACKS)}")


@dataclass
class TrainConfig:
    """Everything that decides the weights, beside the data and the model."""

    # Steps to train for; step n covers positions [(n-1)·batch_size, n·batch_size).
    max_steps: int = 1000
    # Also stop after this many passes over the training posts, for a first look.
    max_epochs: float | None = None
    # Posts in a step, over all ranks; the ranks must divide it.
    batch_size: int = 64
    # Upper bound of posts in one forward pass of a rank: the largest divisor of batch_size / ranks not above it
    # is used.
    micro_batch_size: int = 32
    # Peak learning rate of AdamW.
    lr: float = 3e-4
    # Decoupled weight decay; not applied to biases, norms and other vectors.
    weight_decay: float = 0.01
    # Decay rates of AdamW's moments.
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    # Steps of linear warm-up.
    warmup_steps: int = 50
    # Learning rate at the end of the cosine, as a share of the peak.
    min_lr_ratio: float = 0.0
    # Horizon of the cosine; by default the last step that the first start would reach. It does not move on resume.
    schedule_steps: int | None = None
    # Largest norm of the gradient; 0 switches clipping off.
    grad_clip: float = 1.0
    # Each encoder layer below the top learns at this factor of the one above it; 1 is off.
    layer_decay: float = 1.0
    # Pattern of names, as in `freeze` -> the factor of `lr` there, e.g. {heads: 10}, whatever layer_decay says; where
    # several match, the last one counts.
    lr_factors: dict[str, float] = field(default_factory=dict)
    # Parameters and modules whose names match one of these patterns (fnmatch) are not trained: "text.*embeddings*", or
    # text, image and fusion, which leaves the head. An encoder of which nothing is trained works without dropout.
    freeze: list[str] = field(default_factory=list)
    # Validate, evaluate and export an exponential moving average of the weights, which keeps this share of itself at
    # each step, less in the first ones; 0 is off.
    ema_decay: float = 0.0
    # Compute once what the frozen encoders say of each post (of the fusion too, where it is frozen) and train on that:
    # the logits are the same to the sixth digit, the steps many times as fast. Encoders and n-grams that are trained
    # read the posts as ever.
    cache_embeddings: bool = False
    # Folder of what is computed once, which runs on the same shards and encoders may share; by default `embeddings/` in
    # the run directory. It holds personal data as shards do: remove a shared one when its posts are to be forgotten.
    embeddings_dir: str | None = None
    # Keep few activations of the encoders for the backward pass and compute the others again: less memory, more time.
    gradient_checkpointing: bool = False
    # Compile the towers with torch.compile, for any length of text; the first steps take minutes. Not with zero=3.
    compile: bool = False
    # Number format of the forward and backward pass.
    precision: str = "fp32"
    # What is minimised.
    loss: LossConfig = field(default_factory=LossConfig)
    # Training against evasion.
    attacks: TextAttacksConfig = field(default_factory=TextAttacksConfig)
    # The same scores for disguised texts.
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    # A teacher.
    distill: DistillConfig = field(default_factory=DistillConfig)
    # Translations.
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    # Processes that read and decode for each rank; 0 reads in the training process. They never change the order.
    num_workers: int = 1
    # Log a line every this many steps.
    log_every: int = 1
    # Write the ids of every step to samples/.
    log_samples: bool = False
    # Trace a few steps of every rank to profile/, which slows them down.
    profile: bool = False
    # Stop after this many evaluations without a better `checkpoint.metric`; by default never.
    patience: int | None = None
    # Share of the samples read that may turn out to be damaged or missing before training stops.
    max_refused: float = 0.01
    # Steps in a row whose loss or gradient is not finite: each is skipped and its samples are named in
    # quarantine.jsonl; so many stop training.
    max_skipped_steps: int = 5
    # Warn when a loss lies so many deviations above the median of the last 100 (a deviation is 1.48 times the median
    # absolute deviation, and at least a tenth of the median and .01); 0 never does.
    spike_threshold: float = 10.0
    # Use only operations that give the same bits each time: two runs on the same number of ranks have equal weights.
    # Slower on GPUs.
    deterministic: bool = False
    # Seconds after which a step, a save or a pass of an evaluation counts as hanging and ends the job; 0 never does.
    # The start and its first step, which may compile, take as long as they need.
    step_timeout: float = 1800.0
    # Move the checkpoints of this run directory aside and start at step 0.
    restart: bool = False
    # Where shards, seed or mixing changed since the last checkpoint: keep the weights, and draw the steps that are left
    # from a new order.
    new_order: bool = False

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "num_workers", "grad_clip", "weight_decay", "step_timeout", "spike_threshold"):
            at_least(f"train.{name}", getattr(self, name), 0)
        for name in ("max_steps", "batch_size", "micro_batch_size", "log_every", "schedule_steps", "patience"):
            at_least(f"train.{name}", getattr(self, name), 1)
        at_least("train.max_skipped_steps", self.max_skipped_steps, 1)
        within("train.max_refused", self.max_refused, 0, 1)
        within("train.min_lr_ratio", self.min_lr_ratio, 0, 1)
        within("train.layer_decay", self.layer_decay, 0, 1)
        for pattern, factor in self.lr_factors.items():
            above(f"train.lr_factors.{pattern}", factor, 0)
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"train.ema_decay={self.ema_decay}: a number in [0, 1)")
        one_of("train.precision", self.precision, PRECISIONS)
        if not self.lr > 0:
            raise UserError(f"train.lr={self.lr}: must be above 0")
        if self.max_epochs is not None and not self.max_epochs > 0:
            raise UserError(f"train.max_epochs={self.max_epochs}: must be above 0")
        if self.cache_embeddings and not self.freeze:
            raise UserError("train.cache_embeddings=true: freeze the encoders, e.g. train.freeze=[text, image]")
        if self.cache_embeddings and self.attacks.probability and not self.attacks.once:
            raise UserError(
                "train.cache_embeddings=true: train.attacks shows the encoders another text each time; set"
                " train.attacks.once=true, or train.attacks.probability=0"
            )
        if self.cache_embeddings and (self.consistency.weight or self.alignment.pairs is not None):
            raise UserError(
                "train.cache_embeddings=true: not with train.consistency or train.alignment, which show the encoders"
                " more than the posts"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"train.betas={self.betas}: two numbers in [0, 1)")
