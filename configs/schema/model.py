"""The classifier: an encoder for each modality, their fusion."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from crossguard.configs.errors import UserError
from crossguard.configs.schema.audio import AudioEncoderConfig
from crossguard.configs.schema.checks import one_of, within
from crossguard.configs.schema.encoders import (
    EncoderConfig,
    ImageEncoderConfig,
    PixelEncoderConfig,
    TextEncoderConfig,
)
from crossguard.configs.schema.fusion import LATE, FusionConfig
from crossguard.configs.schema.heads import HeadConfig
from crossguard.configs.schema.ngrams import NgramsConfig
from crossguard.configs.schema.video import VideoEncoderConfig

# Those that an encoder reads.
ENCODED = ("text", "image", "video", "audio")
# Reads the same text as `text`, alone or beside it.
NGRAMS = "ngrams"
MODALITIES = ("text", NGRAMS, "image", "video", "audio")


def source_of(modality: str, modalities: Collection[str]) -> str:
    """The modality that a post has or lacks together with this one: n-grams are of the text, where that is read too."""
    return "text" if modality == NGRAMS and "text" in modalities else modality


@dataclass
class ModelConfig:
    """What is trained."""

    # The modalities that the model looks at, of text, ngrams (character n-grams of the same text), image, video and
    # audio; others are ignored even where a post has them.
    modalities: list[str] = field(default_factory=lambda: ["text", "image"])
    # Begin with the weights of an earlier run: its run directory, one of its checkpoints, or a bundle. Encoders and
    # fusion must be the same; of the heads the policies that both have are taken.
    start_from: str | None = None
    # Probability, in training, that some of the modalities of a post that has several are replaced by their "absent"
    # tokens; at least one stays.
    modality_dropout: float = 0.0
    # The text encoder.
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    # Character n-grams, for few labels or without a GPU; alone, or beside encoders. They take no part in the fusion.
    ngrams: NgramsConfig = field(default_factory=NgramsConfig)
    # The image encoder.
    image: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    # The encoder of videos' frames; one that is not described is the image encoder, whose weights they share.
    video: VideoEncoderConfig = field(default_factory=VideoEncoderConfig)
    # The encoder of recordings, and of what is heard in a video of a post without a recording.
    audio: AudioEncoderConfig = field(default_factory=AudioEncoderConfig)
    # How modalities are joined.
    fusion: FusionConfig = field(default_factory=FusionConfig)
    # Head -> its policies; by default one, `main`, decides all. A head of its own lets a policy be trained while
    # everything else is frozen, e.g. train.freeze=[text, image, fusion, heads.main].
    heads: dict[str, HeadConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.modalities:
            raise UserError(f"model.modalities: empty; allowed: {', '.join(MODALITIES)}")
        for name in self.modalities:
            one_of("model.modalities", name, MODALITIES)
        within("model.modality_dropout", self.modality_dropout, 0, 1)
        for name, head in self.heads.items():
            if head.hidden and self.modalities == [NGRAMS]:
                raise UserError(
                    f"model.heads.{name}.hidden={head.hidden}: n-grams are added to what a hidden layer makes of other"
                    " modalities, and there are none; leave it 0"
                )
            if head.hidden and self.fusion.kind == LATE:
                raise UserError(
                    f"model.heads.{name}.hidden={head.hidden}: model.fusion.kind=late adds up what each modality says,"
                    " which a hidden layer would mix; leave it 0, or choose another kind"
                )
        for name, encoder in self.encoders.items():
            if not encoder.is_named:
                raise UserError(
                    f"model.{name}: set one of pretrained, config, build, choose a preset with model=NAME,"
                    f" or leave '{name}' out of model.modalities"
                )
        if not self.video.is_named:
            own = [
                name for name in ("size", "mean", "std", "resize", "pooling") if _differs(name, self.video, self.image)
            ]
            if own:
                raise UserError(
                    f"model.video.{own[0]}={getattr(self.video, own[0])}: without an encoder of its own"
                    f" (model.video.pretrained, config or build) it is that of model.image; leave it out"
                )

    @property
    def shares_image_encoder(self) -> bool:
        """Whether images and the frames of videos are looked at by one encoder."""
        return {"image", "video"} <= set(self.modalities) and not self.video.is_named

    @property
    def frame_encoder(self) -> PixelEncoderConfig:
        """What describes the encoder of frames: `video`, or `image` where that says nothing."""
        return self.video if self.video.is_named else self.image

    @property
    def encoders(self) -> dict[str, EncoderConfig]:
        """Modality -> what describes its encoder; frames that the image encoder looks at have none of their own."""
        every = {name: getattr(self, name) for name in ENCODED if name in self.modalities}
        if "video" in every:
            every["video"] = self.frame_encoder
        if self.shares_image_encoder:
            del every["video"]
        return every

    @property
    def has_pretrained(self) -> bool:
        """Whether the weights of an encoder are read from a hub or a folder."""
        return any(encoder.pretrained for encoder in self.encoders.values())


def _differs(name: str, video: VideoEncoderConfig, image: ImageEncoderConfig) -> bool:
    value = getattr(video, name)
    return value not in (getattr(VideoEncoderConfig(), name), getattr(image, name))
