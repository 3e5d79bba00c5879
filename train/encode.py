"""From a post as it lies in a shard to the numbers that the model reads. Runs in the processes that read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from crossguard.configs.schema.model import ModelConfig
from crossguard.data.curation.attacks import TextAttacks
from crossguard.data.curation.normalise import normalise
from crossguard.data.loading.decode import decode_image
from crossguard.data.loading.encoded import NO_POSITION, EncodedSample
from crossguard.data.loading.sample import RawSample
from crossguard.data.taxonomy import Taxonomy
from crossguard.train.tokenizers import Tokenizer, load_tokenizer

# Raise it whenever the same configuration gives other numbers than before.
ENCODE_VERSION = 1


class PostEncoder:
    """Tokens of the text, scaled images and the label vector of a post; picklable.

    Modalities that the model does not look at are neither tokenized nor decoded. A few milliseconds of Python a post;
    the model itself is never imported here.
    """

    def __init__(
        self,
        config: ModelConfig,
        taxonomy: Taxonomy,
        tokenizer: Tokenizer | None = None,
        attacks: TextAttacks | None = None,
    ):
        """
        Args:
            config: the model's configuration.
            taxonomy: gives the label vector its order.
            tokenizer: one that is loaded already (a bundle's); by default the one that `config` names.
            attacks: what is done to texts that are trained on.
        """
        self.attacks = attacks
        self.normaliser = config.text.normaliser
        self.taxonomy = taxonomy
        self.tokenizer = tokenizer or load_tokenizer(config.text)
        self.max_length = config.text.max_length
        self.prefix = config.text.prefix
        self.image_size = config.image.size
        self.max_images = config.image.max_images if "image" in config.modalities else 0
        self.reads_text = "text" in config.modalities
        self.pad_id = self.tokenizer.pad_id
        self.num_policies = taxonomy.num_labels
        self.fingerprint = self._fingerprint()

    def __call__(self, raw: RawSample, position: int = NO_POSITION) -> EncodedSample:
        """Encode one post.

        Args:
            raw: the post.
            position: in the sample order, while training.

        Raises:
            MediaError: an image cannot be decoded.
        """
        text = raw.text
        if self.attacks is not None and text is not None and position != NO_POSITION:
            text = self.attacks.apply(text, position)
        return EncodedSample(
            id=raw.id,
            language=raw.language,
            input_ids=self._encode_text(text),
            images=[decode_image(data, self.image_size) for data in raw.images[: self.max_images]],
            labels=self._labels(raw.post),
        )

    def text_length(self, text: str | None) -> int:
        """Number of tokens of an encoded text; 0 without text."""
        tokens = self._encode_text(text)
        return 0 if tokens is None else len(tokens)

    def _labels(self, post: Mapping[str, Any]) -> np.ndarray:
        labels = self.taxonomy.label_vector(post["labels"])
        if not self.taxonomy.severities:
            return labels
        return np.concatenate([labels, self.taxonomy.level_vector(post["labels"], post.get("severity", {}))])

    def _encode_text(self, text: str | None) -> np.ndarray | None:
        if text is None or not self.reads_text:
            return None
        text = normalise(text) if self.normaliser else text
        return np.array(self.tokenizer.encode(self.prefix + text, self.max_length), dtype=np.int32)

    def _fingerprint(self) -> str:
        decides = {
            "version": ENCODE_VERSION,
            "tokenizer": self.tokenizer.fingerprint if self.reads_text else None,
            "max_length": self.max_length,
            "prefix": self.prefix,
            "normaliser": self.normaliser,
            "image_size": self.image_size,
            "max_images": self.max_images,
            "policies": self.taxonomy.columns,
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
