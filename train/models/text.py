"""The text tower: any encoder of Hugging Face, one from a configuration, or the user's own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from crossguard.configs.errors import UserError
from crossguard.configs.schema.encoders import TextEncoderConfig
from crossguard.train.models.hugging_face import RANDOM, load_encoder, new_encoder
from crossguard.train.models.tower import Tower, build_own_tower

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Their position 0 comes after the id of the padding token, so that as many positions are lost.
_AFTER_PADDING = ("roberta", "camembert", "longformer", "mpnet", "ibert", "data2vec-text", "luke", "lilt", "xmod")
# What the last layer said in the pass that a thread runs.
_SAID = threading.local()


class TextTower(Tower):
    """Tokens in, one vector a token out, of an encoder of `transformers`: of its top layer, or of several."""

    def __init__(self, encoder: PreTrainedModel, layers: Sequence[int] = ()):
        """Raises:
        UserError: the encoder has not as many layers, or none that can be told apart.
        """
        super().__init__()
        self.encoder, self.layers = encoder, tuple(layers)
        self.width = int(encoder.config.hidden_size) * max(1, len(self.layers))
        if self.layers:
            _blocks(encoder, max(self.layers))[-1].register_forward_hook(_keep)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """int64[B, L] and bool[B, L] → float[B, L, width]; rows of `mask` hold at least one True."""
        if not self.layers:
            hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state
            return hidden
        _SAID.top = None
        found = self.encoder(input_ids=input_ids, attention_mask=mask.long(), output_hidden_states=True)
        top, _SAID.top = _SAID.top, None
        if top is None:
            raise _cannot_tell(self.encoder)
        says = [*found.hidden_states[:-1], top]  # The embeddings come first.
        # Some encoders fill texts up to a multiple of their window.
        return torch.cat([says[layer][:, : input_ids.shape[1]] for layer in self.layers], dim=-1)


def _keep(_block: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
    """What the last layer says itself: many encoders have a norm after whichever layer is their last."""
    _SAID.top = output if isinstance(output, Tensor) else output[0]


def build_text_tower(config: TextEncoderConfig, vocab_size: int, pad_id: int) -> Tower:
    """The text tower that a configuration names.

    An encoder of the user's own (`build: module:function`) is called with `config` and returns a module whose
    `forward(input_ids int64[B, L], mask bool[B, L])` gives float[B, L, width] and whose attribute `width` says how
    wide. The output at a token must not depend on where `mask` is False.

    Raises:
        UserError: no such encoder, or it does not fit the tokenizer or `max_length`.
    """
    if config.build:
        return build_own_tower(config.build, "model.text.build", config)
    if config.pretrained:
        encoder = load_encoder(config.pretrained, "text", layers=config.depth)
    else:
        ids = {"vocab_size": vocab_size, "pad_token_id": pad_id, "bos_token_id": None, "eos_token_id": None}
        encoder = new_encoder(config.config, {**ids, **RANDOM}, "text")
    _check_fits(encoder, config, vocab_size, pad_id)
    return TextTower(encoder, config.layers)


def _blocks(encoder: PreTrainedModel, highest: int) -> nn.ModuleList:
    """The layers of an encoder, of which there must be as many."""
    depth = int(encoder.config.num_hidden_layers)
    if highest > depth:
        raise UserError(f"model.text.layers: {highest} is asked for, and the encoder has {depth} layers")
    lists = {name: module for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList)}
    # Layers of ALBERT are those of a group, run several times.
    stored = getattr(encoder.config, "num_hidden_groups", depth)
    found = {name: module for name, module in lists.items() if len(module) == stored}
    # T5 has as many parts inside of a layer; XLM keeps the parts of its layers in lists beside each other.
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1:
        raise _cannot_tell(encoder)
    return found[outermost[0]]


def _cannot_tell(encoder: PreTrainedModel) -> UserError:
    name = encoder.config.model_type
    return UserError(f"model.text.layers: {name} has no layers that can be told apart; leave it out")


def _check_fits(encoder: PreTrainedModel, config: TextEncoderConfig, vocab_size: int, pad_id: int) -> None:
    try:
        known = cast(nn.Embedding, encoder.get_input_embeddings()).num_embeddings
    except NotImplementedError:
        name = encoder.config.model_type
        raise UserError(
            f"model.text: {name} embeds no token ids that could be counted; choose another encoder"
        ) from None
    if known < vocab_size:
        raise UserError(
            f"model.text.tokenizer: has {vocab_size} tokens and the encoder {known}; "
            "use the encoder's own tokenizer, or leave vocab_size out of model.text.config"
        )
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if positions and any(name in encoder.config.model_type for name in _AFTER_PADDING):
        positions -= pad_id + 1
    if positions and positions < config.length:
        raise UserError(f"{config.length_key}: the encoder has only {positions} positions")
