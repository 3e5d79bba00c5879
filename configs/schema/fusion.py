"""How what the encoders say is joined."""

from __future__ import annotations

from dataclasses import dataclass

from crossguard.configs.errors import UserError
from crossguard.configs.schema.checks import at_least, within


@dataclass
class FusionConfig:
    """A small transformer over the tokens of all modalities, and their product."""

    # Width of the fused representation.
    width: int = 128
    # Transformer layers over the joined tokens.
    layers: int = 1
    # Attention heads; divides `width`.
    heads: int = 4
    # Dropout inside the fusion.
    dropout: float = 0.0

    def __post_init__(self) -> None:
        at_least("model.fusion.layers", self.layers, 0)
        at_least("model.fusion.width", self.width, 1)
        at_least("model.fusion.heads", self.heads, 1)
        within("model.fusion.dropout", self.dropout, 0, 1)
        if self.width % self.heads:
            raise UserError(f"model.fusion.heads={self.heads}: must divide model.fusion.width={self.width}")
