"""The image tower: any vision encoder of Hugging Face, one from a configuration, or the user's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from crossguard.configs.errors import UserError
from crossguard.configs.schema.encoders import PixelEncoderConfig
from crossguard.train.models.hugging_face import load_encoder, new_encoder
from crossguard.train.models.tower import Tower, build_own_tower

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ImageTower(Tower):
    """Pixels in, one vector a patch out, of a vision encoder of `transformers`."""

    def __init__(self, encoder: PreTrainedModel, size: int, role: str = "image"):
        """
        Args:
            encoder: of `transformers`.
            size: S, the side of the images.
            role: which key of the configuration an error names.

        Raises:
            UserError: the encoder cannot look at images of that size.
        """
        super().__init__()
        # In evaluation mode a look changes no running statistics.
        self.encoder = encoder.eval()
        # Configurations name their width in many ways, and some of convolutional nets not at all.
        try:
            self.width = _look(encoder, size).shape[-1]
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"model.{role}.size={size}: the encoder cannot look at such images ({reason})") from error

    def forward(self, pixels: Tensor) -> Tensor:
        """float[N, 3, S, S] → float[N, T, width]."""
        return _tokens(self.encoder, pixels)


def _look(encoder: PreTrainedModel, size: int) -> Tensor:
    """The tokens of a blank image; where ZeRO-3 has shared out the weights, from an encoder like it that has none."""
    with torch.no_grad():
        if any(hasattr(parameter, "ds_id") for parameter in encoder.parameters()):
            with torch.device("meta"):
                encoder = type(encoder)(encoder.config).eval()
        device = next(encoder.parameters()).device
        return _tokens(encoder, torch.zeros(1, 3, size, size, device=device))


def _tokens(encoder: PreTrainedModel, pixels: Tensor) -> Tensor:
    hidden: Tensor = encoder(pixel_values=pixels).last_hidden_state
    # A convolutional net gives a map [N, width, h, w].
    return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden


class Normalise(nn.Module):
    """Pixels 0 … 255 to the numbers that the encoder was trained with. Has no weights: nothing to save or to round."""

    def __init__(self, mean: list[float], std: list[float]):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8[N, 3, S, S] → float32[N, 3, S, S]."""
        values = pixels.float() / 255
        mean, std = values.new_tensor(self.mean), values.new_tensor(self.std)
        return (values - mean[:, None, None]) / std[:, None, None]


def build_image_tower(config: PixelEncoderConfig, role: Literal["image", "video"] = "image") -> Tower:
    """The tower for images, or for the frames of videos, that a configuration names.

    An encoder of the user's own (`build: module:function`) is called with `config` and returns a module whose
    `forward(pixels float[N, 3, S, S])`, normalised by `config.mean` and `config.std`, gives float[N, T, width] and
    whose attribute `width` says how wide. The output for an image must not depend on the other images.

    Raises:
        UserError: no such encoder, or it was made for another size.
    """
    if config.build:
        return build_own_tower(config.build, f"model.{role}.build", config)
    encoder = (
        load_encoder(config.pretrained, role)
        if config.pretrained
        else new_encoder(config.config, {"image_size": config.size}, role)
    )
    made_for = getattr(encoder.config, "image_size", config.size)
    if made_for != config.size:
        raise UserError(
            f"model.{role}.size={config.size}: the encoder was made for {made_for}; set model.{role}.size={made_for}"
        )
    return ImageTower(encoder, config.size, role)
