"""From a post as it lies in a shard to the numbers that the model reads. Runs in the processes that read."""

from __future__ import annotations

import hashlib
import json

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
        disguises: TextAttacks | None = None,
    ):
        """
        Args:
            config: the model's configuration.
            taxonomy: gives the label vector its order.
            tokenizer: one that is loaded already (a bundle's); by default the one that `config` names.
            attacks: what is done to texts that are trained on.
            disguises: the second view of such texts; by default they have none.
        """
        self.attacks, self.disguises = attacks, disguises
        self.normaliser = config.text.normaliser
        self.taxonomy = taxonomy
        self.tokenizer = tokenizer or load_tokenizer(config.text)
        self.max_length = config.text.max_length
        self.prefix = config.text.prefix
        self.image_size = config.image.size
        self.max_images = config.image.max_images if "image" in config.modalities else 0
        self.reads_text = "text" in config.modalities
        self.pad_id = self.tokenizer.pad_id
        self.num_policies = len(taxonomy.names)
        self.fingerprint = self._fingerprint()

    def __call__(self, raw: RawSample, position: int = NO_POSITION) -> EncodedSample:
        """Encode one post.

        Args:
            raw: the post.
            position: in the sample order, while training.

        Raises:
            MediaError: an image cannot be decoded.
        """
        text, disguised = raw.text, None
        if self.disguises is not None and position != NO_POSITION:
            disguised = self.tokens(None if text is None else self.disguises.apply(text, position))
            disguised = np.zeros(0, dtype=np.int32) if disguised is None else disguised
        if self.attacks is not None and text is not None and position != NO_POSITION:
            text = self.attacks.apply(text, position)
        return EncodedSample(
            id=raw.id,
            language=raw.language,
            input_ids=self.tokens(text),
            images=[decode_image(data, self.image_size) for data in raw.images[: self.max_images]],
            labels=self.taxonomy.label_vector(raw.post["labels"]),
            disguised=disguised,
        )

    def text_length(self, text: str | None) -> int:
        """Number of tokens of an encoded text; 0 without text."""
        tokens = self.tokens(text)
        return 0 if tokens is None else len(tokens)

    def tokens(self, text: str | None) -> np.ndarray | None:
        """int32[L]: a text as the model reads it, normalised and with its prefix; None without text."""
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
            "policies": self.taxonomy.names,
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
