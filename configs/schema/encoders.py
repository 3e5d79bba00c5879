"""The encoders of the modalities: where each comes from, and what it is given to read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from crossguard.configs.errors import UserError
from crossguard.configs.schema.checks import at_least, one_of, within

TEXT_POOLINGS = ("mean", "first", "last")
IMAGE_POOLINGS = ("mean", "first", "pooler")
STRETCH, CROP = "stretch", "crop"
# None, and the version that data/curation/normalise.py has.
NORMALISERS = (0, 2)
# The tokenizer that needs no file, and how many tokens it has: the bytes, and three of its own.
BYTES = "bytes"
BYTE_TOKENS = 259
# The target of an adapter that stands for every linear module.
ALL_LINEAR = "all-linear"
# What may be written in a post beside its caption: on screen, as words spoken, by others below it.
FURTHER_TEXTS = ("ocr", "transcript", "comments")


@dataclass
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685): the encoder stays as it is, small matrices beside it are trained."""

    # Rank of the adapters; 0 trains the encoder itself.
    rank: int = 0
    # The adapters' output is scaled by alpha / rank.
    alpha: float = 16.0
    # Dropout in front of the adapters.
    dropout: float = 0.0
    # Names of linear modules that get one, or the ends of such names (query, attention.self.value); all-linear: each.
    targets: list[str] = field(default_factory=lambda: [ALL_LINEAR])

    def check(self, key: str) -> None:
        """Check the values that stand under `key`."""
        at_least(f"{key}.rank", self.rank, 0)
        within(f"{key}.dropout", self.dropout, 0, 1)
        if not self.alpha > 0:
            raise UserError(f"{key}.alpha={self.alpha}: must be above 0")
        if not self.targets:
            raise UserError(f"{key}.targets: empty; name linear modules, or say {ALL_LINEAR}; {key}.rank=0 is without")


@dataclass
class EncoderConfig:
    """Exactly one of `pretrained`, `config` and `build` says what the encoder is."""

    # A Hugging Face model: hub id or local folder.
    pretrained: str | None = None
    # A model from scratch: a `transformers` configuration with its `model_type`.
    config: dict[str, Any] = field(default_factory=dict)
    # An encoder of your own, `module:function`, called with this configuration.
    build: str | None = None
    # Train adapters beside the encoder instead of the encoder.
    lora: LoraConfig = field(default_factory=LoraConfig)

    def check_encoder(self, key: str) -> None:
        """Check the values that every encoder has, which stand under `key`."""
        given = [f"{key}.{name}" for name in ("pretrained", "config", "build") if getattr(self, name)]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)}: set only one of them (model=inline starts without a preset's)")
        self.lora.check(f"{key}.lora")

    @property
    def depth(self) -> int | None:
        """How many of its layers are run; None: all of them."""
        return None

    @property
    def is_named(self) -> bool:
        """Whether anything says what the encoder is."""
        return bool(self.pretrained or self.config or self.build)

    def check_sizes(self) -> None:
        """Refuse an encoder that is described here and does not fit what it will be given to read."""


@dataclass
class TextEncoderConfig(EncoderConfig):
    """The encoder of everything that is written in a post."""

    # `bytes` (UTF-8, any language, no file), a hub id or a local folder; by default that of `pretrained`.
    tokenizer: str | None = None
    # Tokens kept of a post's caption, special ones included.
    max_length: int = 128
    # What else is read, behind the caption, and how many tokens are kept of it: any of ocr (text on screen), transcript
    # (of spoken words) and comments, e.g. {ocr: 64, comments: 128}.
    fields: dict[str, int] = field(default_factory=dict)
    # Fill every text up to as many tokens as there may be with padding that the encoder reads like words, as SigLIP was
    # trained.
    fill: bool = False
    # Put in front of every text, for encoders that were trained with one (e5: "query: ").
    prefix: str = ""
    # Layers of the encoder whose outputs, side by side, are what it says of a token (1 is the lowest, arXiv
    # 1802.05365), before the norm that some encoders have after the last; by default the top one alone, with that norm.
    # Of a frozen encoder, middle layers carry over better between languages; what lies above them is not even loaded.
    layers: list[int] = field(default_factory=list)
    # Version of the normaliser that undoes disguises in texts (look-alike letters, invisible characters, h.a.t.e);
    # 0 reads texts as they are.
    normaliser: int = 0
    # How tokens become the encoder's summary: mean over the text, the first token (BERT's [CLS]), or the last one (of
    # encoders that read from left to right, such as CLIP's).
    pooling: str = "mean"

    def __post_init__(self) -> None:
        self.check_encoder("model.text")
        at_least("model.text.max_length", self.max_length, 4)
        for layer in self.layers:
            at_least("model.text.layers", layer, 1)
        for name, tokens in self.fields.items():
            one_of("model.text.fields", name, FURTHER_TEXTS)
            at_least(f"model.text.fields.{name}", tokens, 2)
        one_of("model.text.pooling", self.pooling, TEXT_POOLINGS)
        if self.normaliser not in NORMALISERS:
            raise UserError(f"model.text.normaliser={self.normaliser}: one of {', '.join(map(str, NORMALISERS))}")

    @property
    def depth(self) -> int | None:
        """Those up to the highest that is looked at."""
        return max(self.layers, default=None)

    @property
    def length(self) -> int:
        """The most tokens that a post can have: those of its caption and of everything else that is read."""
        return self.max_length + sum(self.fields.values())

    @property
    def length_key(self) -> str:
        """What decides `length`, and its value, for messages."""
        return f"model.text.max_length={self.max_length}" + (
            f" and model.text.fields={dict(self.fields)}" if self.fields else ""
        )

    def check_sizes(self) -> None:
        """An encoder that is described here must have a position for every token, and a number for every byte."""
        positions, numbers = self.config.get("max_position_embeddings"), self.config.get("vocab_size")
        if isinstance(positions, int) and positions < self.length:
            raise UserError(
                f"{self.length_key}: the encoder has only {positions} positions"
                " (model.text.config.max_position_embeddings)"
            )
        if self.tokenizer in (None, BYTES) and isinstance(numbers, int) and numbers < BYTE_TOKENS:
            raise UserError(
                f"model.text.config.vocab_size={numbers}: the tokenizer 'bytes' has {BYTE_TOKENS} tokens; leave it out"
            )


@dataclass
class PixelEncoderConfig(EncoderConfig):
    """An encoder of square pictures."""

    # Height and width in pixels that images and frames are scaled to.
    size: int = 64
    # Mean of the channels (red, green, blue) in [0, 1] that is subtracted.
    mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    # Standard deviation of the channels that is divided by.
    std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    # How a picture becomes a square: stretch it whole, or crop its middle (as CLIP and DINOv2 were trained); both are
    # scaled with bilinear interpolation, images antialiased.
    resize: str = STRETCH
    # How tokens become a picture's summary: mean over them, the first token ([CLS] of CLIP and DINOv2), or what the
    # encoder's own pooler makes of them (SigLIP's attention head).
    pooling: str = "mean"

    def check_pixels(self, key: str) -> None:
        """Check the values that stand under `key`."""
        self.check_encoder(key)
        at_least(f"{key}.size", self.size, 8)
        one_of(f"{key}.resize", self.resize, (STRETCH, CROP))
        one_of(f"{key}.pooling", self.pooling, IMAGE_POOLINGS)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std, default=0) <= 0:
            raise UserError(f"{key}.mean and {key}.std: three numbers each, std above 0")

    def check_size(self, key: str) -> None:
        """An encoder that is described here must look at pictures of `size`."""
        made_for = self.config.get("image_size", self.size)
        if isinstance(made_for, int) and made_for != self.size:
            raise UserError(
                f"{key}.size={self.size}: the encoder was made for {made_for} ({key}.config.image_size); leave that out"
            )


@dataclass
class ImageEncoderConfig(PixelEncoderConfig):
    """The encoder of images."""

    # Images looked at in a post that has several.
    max_images: int = 1

    def __post_init__(self) -> None:
        self.check_pixels("model.image")
        at_least("model.image.max_images", self.max_images, 1)

    def check_sizes(self) -> None:
        """An encoder that is described here must look at images of `size`."""
        self.check_size("model.image")
