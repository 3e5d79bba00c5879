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


class _NoPooler(Exception):
    """An encoder was asked for what its pooler says and has none."""


class ImageTower(Tower):
    """Pixels in, one vector a patch out, of a vision encoder of `transformers`."""

    def __init__(self, encoder: PreTrainedModel, size: int, role: str = "image", pooler: bool = False):
        """
        Args:
            encoder: of `transformers`.
            size: S, the side of the images.
            role: which key of the configuration an error names.
            pooler: what the encoder's own pooler says leads the tokens.

        Raises:
            UserError: the encoder cannot look at images of that size, or has no pooler.
        """
        super().__init__()
        # In evaluation mode a look changes no running statistics.
        self.encoder = encoder.eval()
        self.pooler = pooler
        # Configurations name their width in many ways, and some of convolutional nets not at all.
        try:
            self.width = _look(encoder, size, pooler).shape[-1]
        except (RuntimeError, ValueError) as error:
            made_for = getattr(encoder.config, "image_size", size)
            reason = f"the encoder cannot look at such images ({str(error).splitlines()[0]})"
            if made_for != size:
                reason = f"the encoder was made for {made_for}; set model.{role}.size={made_for}"
            raise UserError(f"model.{role}.size={size}: {reason}") from error
        except _NoPooler:
            raise UserError(f"model.{role}.pooling=pooler: the encoder has none; choose mean or first") from None

    def forward(self, pixels: Tensor) -> Tensor:
        """float[N, 3, S, S] → float[N, T, width]."""
        return _tokens(self.encoder, pixels, self.pooler)


def _look(encoder: PreTrainedModel, size: int, pooler: bool) -> Tensor:
    """The tokens of a blank image; where ZeRO-3 has shared out the weights, from an encoder like it that has none."""
    with torch.no_grad():
        if any(hasattr(parameter, "ds_id") for parameter in encoder.parameters()):
            with torch.device("meta"):
                encoder = type(encoder)(encoder.config).eval()
        device = next(encoder.parameters()).device
        return _tokens(encoder, torch.zeros(1, 3, size, size, device=device), pooler)


def _tokens(encoder: PreTrainedModel, pixels: Tensor, pooler: bool) -> Tensor:
    output = encoder(**(_patches(encoder, pixels) if _is_naflex(encoder) else {"pixel_values": pixels}))
    hidden: Tensor = output.last_hidden_state
    # A convolutional net gives a map [N, width, h, w].
    tokens = hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden
    if not pooler:
        return tokens
    pooled: Tensor | None = getattr(output, "pooler_output", None)
    if pooled is None:
        raise _NoPooler
    return torch.cat([pooled.flatten(1)[:, None], tokens], dim=1)


def _is_naflex(encoder: PreTrainedModel) -> bool:
    return encoder.config.model_type == "siglip2_vision_model"


def _patches(encoder: PreTrainedModel, pixels: Tensor) -> dict[str, Tensor]:
    """The input of SigLIP 2's NaFlex encoders (arXiv 2502.14786): patches of a grid of any height and width, here that
    of a square."""
    side, number = encoder.config.patch_size, len(pixels)
    rows = pixels.shape[-1] // side
    if rows * side != pixels.shape[-1]:
        raise ValueError(f"must be a multiple of its patches' side, {side}")
    grid = pixels.reshape(number, 3, rows, side, rows, side).permute(0, 2, 4, 3, 5, 1)
    return {
        "pixel_values": grid.reshape(number, rows * rows, -1),
        "pixel_attention_mask": torch.ones(number, rows * rows, dtype=torch.int64, device=pixels.device),
        # Read as numbers in Python: on a GPU each would wait for it.
        "spatial_shapes": torch.full((number, 2), rows, device="cpu"),
    }


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
    pooler = config.pooling == "pooler"
    encoder = (
        load_encoder(config.pretrained, role, pooler=pooler)
        if config.pretrained
        else new_encoder(config.config, {"image_size": config.size}, role)
    )
    return ImageTower(encoder, config.size, role, pooler)
