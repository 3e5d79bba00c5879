"""The classifier: a tower for each modality, their fusion, one logit for each policy."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from crossguard.configs.schema.model import ModelConfig
from crossguard.data.loading.collate import Batch
from crossguard.train.models.fusion import Fusion
from crossguard.train.models.image import Normalise, build_image_tower
from crossguard.train.models.lora import add_lora
from crossguard.train.models.modality_dropout import drop_modalities
from crossguard.train.models.text import build_text_tower
from crossguard.train.models.tokens import Tokens, summarise
from crossguard.train.models.views import read_views


class Classifier(nn.Module):
    """Posts in, logits out.

    Every module runs for every batch, also when no post has its modality, so that ranks whose batches differ still
    gather and reduce the same parameters. A post's logits do not depend on the posts beside it, nor on padding.
    """

    def __init__(self, config: ModelConfig, num_policies: int, vocab_size: int, pad_id: int, seed: int):
        super().__init__()
        self.modalities = tuple(config.modalities)
        self.pooling, self.pad_id = config.text.pooling, pad_id
        self.modality_dropout, self.seed = config.modality_dropout, seed
        widths = {}
        if "text" in self.modalities:
            self.text = build_text_tower(config.text, vocab_size, pad_id)
            widths["text"] = self.text.width
            add_lora(self.text, config.text.lora, "model.text.lora")
        if "image" in self.modalities:
            self.normalise = Normalise(config.image.mean, config.image.std)
            self.image = build_image_tower(config.image)
            widths["image"] = self.image.width
            add_lora(self.image, config.image.lora, "model.image.lora")
        self.fusion = Fusion(config.fusion, widths)
        self.head = nn.Linear(self.fusion.output_width, num_policies)
        # Every policy starts at probability one half, whatever the encoders say.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> Classifier:
        """Switch to training, all but batch normalisation: it keeps its statistics.

        With those of a micro-batch, logits would depend on the posts beside a post, and ranks would drift apart.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, batch: Batch, views: bool = False) -> Tensor | dict[str, Tensor]:
        """A batch of B posts → logits float32[B, P]; with `views` what `read_views` says of it."""
        if self.training and self.modality_dropout:
            batch = drop_modalities(batch, self.modality_dropout, self.seed)
        return read_views(self, batch, self.pad_id) if views else self.judge(self.read(batch))

    def read(self, batch: Batch) -> dict[str, Tokens]:
        """What each modality's tower says of a batch of B posts."""
        modalities = {}
        if "text" in self.modalities:
            modalities["text"] = self._read_text(batch)
        if "image" in self.modalities:
            modalities["image"] = self._look_at_images(batch)
        return modalities

    def judge(self, modalities: dict[str, Tokens]) -> Tensor:
        """What the towers say of B posts, as `read` gives it → logits float32[B, P]."""
        logits: Tensor = self.head(self.fusion(modalities)).float()
        return logits

    def _read_text(self, batch: Batch) -> Tokens:
        mask = batch.text_mask.clone()
        # A post without text reads one token of padding: attention over nothing is not a number.
        mask[:, 0] |= ~batch.has_text
        values = self.text(batch.input_ids, mask)
        return Tokens(values, mask, summarise(values, mask, self.pooling), batch.has_text)

    def _look_at_images(self, batch: Batch) -> Tokens:
        pixels = self.normalise(batch.pixels).to(self.head.weight.dtype)
        values, mask = _gather_by_post(self.image(pixels), batch.image_post, len(batch))
        return Tokens(values, mask, summarise(values, mask, "mean"), batch.has_image)


def _gather_by_post(patches: Tensor, image_post: Tensor, num_posts: int) -> tuple[Tensor, Tensor]:
    """Lay the patches of each post's images side by side.

    Args:
        patches: float[N, T, D].
        image_post: int64[N]: the post each image belongs to; -1 belongs to none.
        num_posts: B.

    Returns:
        float[B, M·T, D] and bool[B, M·T], where M is the largest number of images of a post.
    """
    _, length, width = patches.shape
    # Images that belong to no post go to one row more, which is cut off: their tower still gets a gradient, of zeros.
    row = torch.where(image_post < 0, num_posts, image_post)
    counts = torch.bincount(row, minlength=num_posts + 1)[:num_posts]
    same = (row[:, None] == row[None, :]) & (row < num_posts)
    place = same.tril(-1).sum(1)
    most = max(1, int(counts.max()))
    values = patches.new_zeros(num_posts + 1, most, length, width).index_put((row, place), patches)
    mask = torch.arange(most, device=row.device)[None, :] < counts[:, None]
    return values[:num_posts].flatten(1, 2), mask.repeat_interleave(length, dim=1)
