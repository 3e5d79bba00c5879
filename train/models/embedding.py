"""The seam between the frozen part of a classifier and the part that is trained: what crosses it depends on a post
alone, so that it can be computed once (`train.cache_embeddings`).

Where the fusion is frozen too, one vector crosses; elsewhere each frozen modality's summary, and its tokens where the
fusion looks at them. Towers that are trained read the posts beside it. Modality dropout lies behind the towers and in
front of the fusion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from crossguard.configs.errors import UserError
from crossguard.configs.schema.model import MODALITIES, NGRAMS
from crossguard.data.loading.embeddings import COUNTS, VALUES
from crossguard.train.models.tokens import Tokens

if TYPE_CHECKING:
    from crossguard.train.models.classifier import Classifier

# The modules of a classifier that read posts, and the modality that each belongs to; frames may be looked at by the
# image tower.
FRONTS = {
    "text": "text",
    "segments": "text",
    "ngrams": "ngrams",
    "image": "image",
    "video": "video",
    "frames": "video",
    "audio": "audio",
    "hearing": "audio",
}
FUSED = "fused"
SUMMARY, PRESENT = ".summary", ".present"


@dataclass(frozen=True)
class Seam:
    """What crosses from the frozen part."""

    # Of the classifier's modules those that are not run again.
    frozen: tuple[str, ...]
    # What these read.
    modalities: tuple[str, ...]
    # One vector a post, in place of what each tower says that the fusion listens to.
    fused: bool
    # Of each modality also its tokens.
    tokens: bool

    @classmethod
    def of(cls, model: Classifier) -> Seam:
        """Where it lies in a model whose parameters are frozen as they will be in training.

        Raises:
            UserError: no encoder is frozen.
        """
        fronts = {name: module for name, module in model.named_children() if name in FRONTS and _has_weights(module)}
        trained = {name: FRONTS[name] for name, module in fronts.items() if not is_frozen(module)}
        read = set(trained.values())
        if read & {"image", "video"} and getattr(model, "shares_image_tower", False):
            read |= {"image", "video"}
        modalities = tuple(name for name in model.modalities if name not in read)
        fusion = model.fusion
        if fusion is None or not set(modalities) - {NGRAMS}:
            raise UserError(
                "train.cache_embeddings=true: no encoder is frozen as a whole, and what a trained one makes of a post"
                f" changes with each step; freeze one of {', '.join(trained)} (train.freeze)"
            )
        fused = is_frozen(fusion) and not model.modality_dropout and not read - {NGRAMS}
        frozen = [name for name in fronts if FRONTS[name] in modalities]
        return cls((*frozen, *(["fusion"] if fused else [])), modalities, fused, not fused and fusion.reads_tokens)


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def is_frozen(module: nn.Module) -> bool:
    """Whether it has parameters and none of them is trained."""
    return _has_weights(module) and not any(parameter.requires_grad for parameter in module.parameters())


def pack(modalities: dict[str, Tokens], seam: Seam) -> dict[str, Tensor]:
    """What the towers say of B posts, as arrays by name.

    Summaries are float32[B, D]. Tokens lie one after the other, without padding, `.values` float32[Σ counts, D], and
    `.counts` int32[B] says how many each post has; under bf16 autocast they are the bits of bfloat16 in uint16.
    """
    arrays = {}
    for name, tokens in modalities.items():
        arrays[name + SUMMARY], arrays[name + PRESENT] = tokens.summary.float(), tokens.present
        if seam.tokens:
            mask = tokens.mask & tokens.present[:, None]
            half = torch.is_autocast_enabled(mask.device.type)
            values = tokens.values[mask]
            arrays[name + VALUES] = values.bfloat16().view(torch.uint16) if half else values.float()
            arrays[name + COUNTS] = mask.sum(1, dtype=torch.int32)
    return arrays


def unpack(arrays: dict[str, Tensor]) -> dict[str, Tokens]:
    """What `pack` was given, padded to the longest of these posts."""
    modalities = {}
    for name in (name for name in MODALITIES if name + SUMMARY in arrays):
        summary, present = arrays[name + SUMMARY], arrays[name + PRESENT]
        values, mask = summary.new_zeros(len(summary), 0, summary.shape[1]), present.new_zeros(len(summary), 0)
        if name + VALUES in arrays:
            packed, counts = arrays[name + VALUES], arrays[name + COUNTS]
            packed = packed.view(torch.bfloat16) if packed.dtype == torch.uint16 else packed
            longest = int(counts.max())
            mask = torch.arange(longest, device=counts.device)[None, :] < counts[:, None]
            values = packed.new_zeros(len(counts), longest, packed.shape[1])
            values[mask] = packed
        modalities[name] = Tokens(values, mask, summary, present)
    return modalities
