"""The classifier: a text encoder, an image encoder, their fusion."""

from __future__ import annotations

from dataclasses import dataclass, field

from crossguard.configs.errors import UserError
from crossguard.configs.schema.checks import one_of, within
from crossguard.configs.schema.encoders import ImageEncoderConfig, TextEncoderConfig
from crossguard.configs.schema.fusion import LATE, FusionConfig
from crossguard.configs.schema.heads import HeadConfig

MODALITIES = ("text", "image")


@dataclass
class ModelConfig:
    """What is trained."""

    # The modalities that the model looks at; others are ignored even where a post has them.
    modalities: list[str] = field(default_factory=lambda: ["text", "image"])
    # Probability, in training, that one modality of a post that has several is replaced by its "absent" token.
    modality_dropout: float = 0.0
    # The text encoder.
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    # The image encoder.
    image: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    # How modalities are joined.
    fusion: FusionConfig = field(default_factory=FusionConfig)
    # Head -> its policies; by default one, `main`, decides all. A head of its own lets a policy be trained while
    # everything else is frozen, e.g. train.freeze=["text.*", "image.*", "fusion.*", "heads.main.*"].
    heads: dict[str, HeadConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.modalities:
            raise UserError(f"model.modalities: empty; allowed: {', '.join(MODALITIES)}")
        for name in self.modalities:
            one_of("model.modalities", name, MODALITIES)
        within("model.modality_dropout", self.modality_dropout, 0, 1)
        for name, head in self.heads.items():
            if head.hidden and self.fusion.kind == LATE:
                raise UserError(
                    f"model.heads.{name}.hidden={head.hidden}: model.fusion.kind=late adds up what each modality says,"
                    " which a hidden layer would mix; leave it 0, or choose another kind"
                )
        for name in self.modalities:
            encoder = self.text if name == "text" else self.image
            if not (encoder.pretrained or encoder.config or encoder.build):
                raise UserError(
                    f"model.{name}: set one of pretrained, config, build, choose a preset with model=NAME,"
                    f" or leave '{name}' out of model.modalities"
                )

    @property
    def has_pretrained(self) -> bool:
        """Whether the weights of an encoder are read from a hub or a folder."""
        return any((self.text if name == "text" else self.image).pretrained for name in self.modalities)
