"""How what the encoders say is joined."""

from __future__ import annotations

from dataclasses import dataclass

from crossguard.configs.errors import UserError
from crossguard.configs.schema.checks import at_least, one_of, within

LATE, GATED, CROSS, JOINT = "late", "gated", "cross", "joint"
KINDS = (LATE, GATED, CROSS, JOINT)


@dataclass
class FusionConfig:
    """From the tokens of every modality to one vector a post."""

    # late adds up what each modality says and finds no combination of them; gated lets modalities open and close each
    # other's features; cross lets the tokens of each attend to those of the others; joint is a small transformer over
    # all tokens. Cross and joint have the product of the modalities' summaries as well.
    kind: str = "joint"
    # Width of the fused representation.
    width: int = 128
    # Transformer layers of cross and joint.
    layers: int = 1
    # Attention heads; divides `width`.
    heads: int = 4
    # Dropout inside the fusion.
    dropout: float = 0.0
    # In joint: so many tokens through which alone the modalities' tokens hear of each other, in place of attention over
    # all of them (arXiv 2107.00135); 0 is off. Cheaper where modalities have many tokens.
    bottleneck: int = 0

    def __post_init__(self) -> None:
        one_of("model.fusion.kind", self.kind, KINDS)
        at_least("model.fusion.layers", self.layers, 0)
        at_least("model.fusion.width", self.width, 1)
        at_least("model.fusion.heads", self.heads, 1)
        at_least("model.fusion.bottleneck", self.bottleneck, 0)
        within("model.fusion.dropout", self.dropout, 0, 1)
        if self.width % self.heads:
            raise UserError(f"model.fusion.heads={self.heads}: must divide model.fusion.width={self.width}")
        if self.kind == CROSS and self.layers < 1:
            raise UserError(f"model.fusion.layers={self.layers}: model.fusion.kind=cross needs at least 1")
        if self.bottleneck and self.kind != JOINT:
            raise UserError(f"model.fusion.bottleneck={self.bottleneck}: only with model.fusion.kind=joint")
        if self.bottleneck and self.layers < 2:
            raise UserError(
                f"model.fusion.layers={self.layers}: model.fusion.bottleneck needs at least 2, the first to write into"
                " the bottleneck, the next to read from it"
            )
