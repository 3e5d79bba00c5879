"""How videos are looked at: some frames of each, one by one."""

from __future__ import annotations

from dataclasses import dataclass

from crossguard.configs.schema.checks import one_of, within
from crossguard.configs.schema.encoders import PixelEncoderConfig

UNIFORM, SCENES = "uniform", "scenes"
MOST_FRAMES = 256


@dataclass
class VideoEncoderConfig(PixelEncoderConfig):
    """The encoder of frames. Without `pretrained`, `config` and `build` it is the image encoder: the same weights look
    at images and frames, of its `size`, `resize`, `mean`, `std` and `pooling`."""

    # Frames looked at in a video.
    frames: int = 8
    # Which: `uniform`, in the middle of as many equal parts, or `scenes`, the first one and those at the strongest
    # changes of picture.
    sampling: str = UNIFORM

    def __post_init__(self) -> None:
        self.check_pixels("model.video")
        within("model.video.frames", self.frames, 1, MOST_FRAMES)
        one_of("model.video.sampling", self.sampling, (UNIFORM, SCENES))

    def check_sizes(self) -> None:
        """An encoder that is described here must look at frames of `size`."""
        self.check_size("model.video")
