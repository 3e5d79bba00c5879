"""From a post as it lies in a shard to the numbers that the model reads. Runs in the processes that read."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from crossguard.configs.schema.encoders import FURTHER_TEXTS
from crossguard.configs.schema.model import NGRAMS, ModelConfig
from crossguard.data.curation.attacks import TextAttacks
from crossguard.data.curation.normalise import normalise
from crossguard.data.loading.clips import Clip, sample_frames
from crossguard.data.loading.decode import MediaError, decode_image
from crossguard.data.loading.encoded import NO_POSITION, EncodedSample, Layout
from crossguard.data.loading.ngrams import hashed_ngrams
from crossguard.data.loading.sample import RawSample
from crossguard.data.loading.sound import Hearing, decode_sound
from crossguard.data.taxonomy import Taxonomy
from crossguard.train.tokenizers import Tokenizer, load_tokenizer

# Raise it whenever the same configuration gives other numbers than before.
ENCODE_VERSION = 2
# What decides the disguise of a text: the post's position in the sample order, or its id.
Place = int | str
# Not written by anybody who would disguise it.
TRANSCRIPT = "transcript"


class PostEncoder:
    """Tokens of the texts, scaled images and frames, sound and the label vector of a post; picklable.

    Modalities that the model does not look at are neither tokenized nor decoded. A few milliseconds of Python a post
    without video; the model itself is never imported here.
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
        self.change: Callable[[RawSample], RawSample] | None = None
        self.taxonomy = taxonomy
        self.text = config.text
        self.fields = [name for name in FURTHER_TEXTS if name in config.text.fields]
        self.tokenizer = tokenizer or load_tokenizer(config.text)
        self.reads_text = "text" in config.modalities
        self.ngrams = config.ngrams if NGRAMS in config.modalities else None
        self.image_resize, self.frame_resize = config.image.resize, config.frame_encoder.resize
        self.max_images = config.image.max_images if "image" in config.modalities else 0
        self.video = config.video if "video" in config.modalities else None
        self.audio = config.audio if "audio" in config.modalities else None
        self.hearing = Hearing(config.audio) if self.audio else None
        self.num_labels = taxonomy.num_labels
        self.layout: Layout = {
            "pad_id": self.tokenizer.pad_id,
            "image_size": config.image.size,
            "num_labels": self.num_labels,
            "frame_size": config.frame_encoder.size if self.video else None,
            "silence": self.hearing.silence if self.hearing else None,
        }
        self.fingerprint = self._fingerprint()

    def under(self, change: Callable[[RawSample], RawSample]) -> PostEncoder:
        """The same for posts that are changed before anything else; `change` is picklable."""
        other = copy.copy(self)
        other.change = change
        return other

    def only(self, modalities: Collection[str]) -> PostEncoder:
        """The same without other modalities, for a model that is given what it would say of them."""
        other = copy.copy(self)
        other.reads_text = self.reads_text and "text" in modalities
        other.ngrams = self.ngrams if NGRAMS in modalities else None
        other.max_images = self.max_images if "image" in modalities else 0
        other.video = self.video if "video" in modalities else None
        if "audio" not in modalities:
            other.audio, other.hearing = None, None
        other.fingerprint = other._fingerprint()
        return other

    @property
    def reads_posts(self) -> bool:
        """Whether anything is read of a post beside its labels."""
        return bool(self.reads_text or self.ngrams or self.max_images or self.video or self.hearing)

    def __call__(self, raw: RawSample, position: int = NO_POSITION) -> EncodedSample:
        """Encode one post.

        Args:
            raw: the post.
            position: in the sample order, while training.

        Raises:
            MediaError: an image, a video or a recording cannot be decoded.
        """
        raw = raw if self.change is None else self.change(raw)
        once = self.attacks is not None and self.attacks.once and position != NO_POSITION
        place = raw.id if once else position
        input_ids, segments = self._written(raw, place, self.attacks)
        disguised, disguised_segments = None, None
        if self.disguises is not None and position != NO_POSITION:
            disguised, disguised_segments = self._written(raw, place, self.disguises)
            disguised = np.zeros(0, dtype=np.int32) if disguised is None else disguised
        return EncodedSample(
            id=raw.id,
            language=raw.language,
            input_ids=input_ids,
            images=[
                decode_image(data, self.layout["image_size"], self.image_resize)
                for data in raw.images[: self.max_images]
            ],
            labels=self._labels(raw.post),
            segments=segments,
            clip=self._frames(raw),
            sound=self._sound(raw),
            disguised=disguised,
            disguised_segments=disguised_segments,
            ngrams=self._hashed(raw, place),
        )

    def text_length(self, raw: RawSample) -> int:
        """Number of tokens of an encoded post; 0 without text."""
        return sum(map(len, self._parts(raw, NO_POSITION, None)))

    def tokens(self, text: str) -> np.ndarray:
        """int32[L]: a text of no post, as the caption of one is read."""
        tokens, _ = self._written(RawSample({}, text), NO_POSITION, None)
        assert tokens is not None, "the model reads no text"
        return tokens

    def _labels(self, post: Mapping[str, Any]) -> np.ndarray:
        labels = self.taxonomy.label_vector(post["labels"])
        if not self.taxonomy.severities:
            return labels
        return np.concatenate([labels, self.taxonomy.level_vector(post["labels"], post.get("severity", {}))])

    def _written(
        self, raw: RawSample, place: Place, attacks: TextAttacks | None
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """int32[L] and uint8[L]: the tokens of all that is read, and the field of each where several are."""
        parts = self._parts(raw, place, attacks)
        if not parts:
            return None, None
        tokens = parts[0] if len(parts) == 1 else list(itertools.chain(*parts))
        return np.array(tokens, dtype=np.int32), _numbered(parts) if self.fields else None

    def _parts(self, raw: RawSample, place: Place, attacks: TextAttacks | None) -> list[list[int]]:
        """The tokens of the caption and of each further field that is read; empty where nothing is written in any.

        Every sequence begins as one of the encoder's own, with or without a caption.
        """
        fields = [list(self._texts(raw, name, place, attacks)) for name in self.fields]
        if not self.reads_text or (raw.text is None and not any(fields)):
            return []
        caption = "" if raw.text is None else self._plain("", raw.text, place, attacks)
        parts = [self.tokenizer.encode(self.text.prefix + caption, self.text.max_length)]
        for name, texts in zip(self.fields, fields, strict=True):
            most, tokens = self.text.fields[name], list[int]()
            for text in texts:
                if len(tokens) < most:
                    tokens += self.tokenizer.encode_further(text, most - len(tokens))
            parts.append(tokens)
        if self.text.fill:
            parts[-1] += [self.tokenizer.pad_id] * (self.text.length - sum(map(len, parts)))
        return parts

    def _hashed(self, raw: RawSample, place: Place) -> np.ndarray | None:
        """The n-grams of all that is written."""
        if self.ngrams is None:
            return None
        texts = [] if raw.text is None else [self._plain("", raw.text, place, self.attacks)]
        texts += [text for name in self.fields for text in self._texts(raw, name, place, self.attacks)]
        if not texts:
            return None
        written = "\n".join(texts)[: self.ngrams.max_characters]
        return hashed_ngrams(written, self.ngrams.min_n, self.ngrams.max_n, self.ngrams.buckets)

    def _texts(self, raw: RawSample, name: str, place: Place, attacks: TextAttacks | None) -> Iterator[str]:
        """What is written in a field, as it is tokenized."""
        value = raw.texts.get(name, [])
        for number, text in enumerate([value] if isinstance(value, str) else value):
            yield text if name == TRANSCRIPT else self._plain(f"{name}/{number}", text, place, attacks)

    def _plain(self, field: str, text: str, place: Place, attacks: TextAttacks | None) -> str:
        """A text that a user has written: while training disguised now and then, and without disguise as far as the
        normaliser knows it."""
        if attacks is not None and place != NO_POSITION:
            text = attacks.apply(text, place, field)
        return normalise(text) if self.text.normaliser else text

    def _frames(self, raw: RawSample) -> Clip | None:
        if self.video is None or raw.video is None:
            return None
        size = self.layout["frame_size"]
        assert size is not None
        return sample_frames(raw.video, self.video.frames, size, self.video.sampling, self.frame_resize)

    def _sound(self, raw: RawSample) -> np.ndarray | None:
        """Of the recording, or else of the video, which may have none."""
        data = raw.audio or raw.video
        if self.hearing is None or data is None:
            return None
        samples = decode_sound(data, self.hearing.max_seconds)
        if samples is None and raw.audio:
            raise MediaError("a recording without sound")
        return None if samples is None else self.hearing(samples)

    def _fingerprint(self) -> str:
        decides = {
            "version": ENCODE_VERSION,
            "tokenizer": self.tokenizer.fingerprint if self.reads_text else None,
            "max_length": self.text.max_length,
            "fields": dict(self.text.fields),
            "fill": self.text.fill,
            "prefix": self.text.prefix,
            "normaliser": self.text.normaliser,
            "ngrams": dataclasses.asdict(self.ngrams) if self.ngrams else None,
            "image_size": self.layout["image_size"],
            "resize": self.image_resize,
            "max_images": self.max_images,
            "video": [self.video.frames, self.video.sampling, self.layout["frame_size"], self.frame_resize]
            if self.video
            else None,
            "audio": [self.audio.features, self.audio.mel_bins, self.audio.max_seconds] if self.audio else None,
            "policies": self.taxonomy.columns,
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _numbered(parts: list[list[int]]) -> np.ndarray:
    """uint8, for each token the number of the part that it is in."""
    return np.repeat(np.arange(len(parts), dtype=np.uint8), [len(part) for part in parts])
