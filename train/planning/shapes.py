"""The model and a batch without memory: shapes and types are right, no number is stored and no weight downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from crossguard.configs.errors import UserError
from crossguard.configs.schema import Config
from crossguard.configs.schema.model import ModelConfig
from crossguard.data.taxonomy import Taxonomy
from crossguard.train.models import Classifier, freeze_unused
from crossguard.train.models.activations import checkpoint_activations
from crossguard.train.models.example import PostSize, example_batch
from crossguard.train.models.hugging_face import Role, pretrained_config
from crossguard.train.optimizer import freeze
from crossguard.train.planning.trace import Trace, trace_step
from crossguard.train.tokenizers import load_tokenizer

# What training asks tensors for, which then have no numbers to answer with.
_ITEM = torch.ops.aten._local_scalar_dense.default
_COUNTS = torch.ops.aten.bincount.default


class Shapes:
    """The classifier that training would build, its unused and frozen parameters marked."""

    def __init__(self, config: Config):
        """
        Raises:
            UserError: an encoder does not exist, does not fit, or cannot be run without its numbers.
        """
        taxonomy = Taxonomy.from_config(config.taxonomy)
        self.config, self.num_labels = config, taxonomy.num_labels
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        model_config, vocab_size, pad_id = _described(config.model)
        try:
            with torch.device("meta"):
                self.model = Classifier(model_config, taxonomy, vocab_size, pad_id, config.seed)
            with self._open():
                # What lies on "meta" would not follow the rules of autocast.
                self.model.to_empty(device="cpu")
                freeze_unused(
                    self.model, example_batch(config.model, self.num_labels, 1, PostSize.largest(config.model))
                )
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"model: cannot be run on shapes alone, so not be planned ({reason})") from error
        # Names of the parameters that are frozen because nothing depends on them, or by adapters beside them.
        self.unused = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        freeze(self.model, config.train.freeze)
        if config.train.gradient_checkpointing:
            checkpoint_activations(self.model)

    def trace(self, posts: int, size: PostSize | None = None) -> Trace:
        """A forward and backward pass over a batch of `posts` of a size: by default as large as they may be."""
        size = size or PostSize.largest(self.config.model)
        with self._open(size.images):
            batch = example_batch(self.config.model, self.num_labels, posts, size)
            twice = bool(self.config.train.consistency.weight)
            if twice:
                ids, mask, segments = batch.input_ids, batch.text_mask, batch.segments
                batch = replace(batch, disguised_ids=ids, disguised_mask=mask, disguised_segments=segments)
            return trace_step(self.model, batch, bf16=self.config.train.precision == "bf16", views=twice)

    @contextmanager
    def _open(self, images: int | None = None) -> Iterator[None]:
        """Inside, tensors on "cpu" have a shape and a type, and no memory."""
        with (
            self._mode,
            _Answers(images or self.config.model.image.max_images),
            _FusedAttention(self.config.cluster.is_gpu),
        ):
            yield


def _described(config: ModelConfig) -> tuple[ModelConfig, int, int]:
    """The model without its pretrained weights, the size of its vocabulary and the id of its padding.

    Of a pretrained encoder only `config.json` is read. Its own tokenizer has no more tokens than it.
    """
    encoders: dict[str, Any] = {
        "image" if encoder is config.image else name: replace(
            encoder, pretrained=None, config=pretrained_config(encoder.pretrained, cast(Role, name), encoder.depth)
        )
        for name, encoder in config.encoders.items()
        if encoder.pretrained
    }
    described = replace(config, **encoders)
    if "text" in encoders and config.text.tokenizer is None:
        values = described.text.config
        return described, int(values["vocab_size"]), int(values.get("pad_token_id") or 0)
    tokenizer = load_tokenizer(config.text)
    return described, tokenizer.vocab_size, tokenizer.pad_id


class _Answers(TorchDispatchMode):
    """Answers where Python asks for a number in a tensor: a post has `most` images, and no mask is all true or all
    false, so that nothing is left out."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ITEM:
            return False if args[0].dtype == torch.bool else self.most
        if func is _COUNTS:  # As many as it is asked for at least.
            return args[0].new_zeros({"minlength": args[-1], **(kwargs or {})}["minlength"])
        return func(*args, **(kwargs or {}))


class _FusedAttention(TorchFunctionMode):
    """On GPUs attention keeps no matrix of scores even with dropout, whose mask is drawn again; on CPU it does."""

    def __init__(self, is_gpu: bool):
        super().__init__()
        self.is_gpu = is_gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.is_gpu and func is torch.nn.functional.scaled_dot_product_attention:
            args, kwargs = args[:4], {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)
