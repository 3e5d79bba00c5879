"""Bytes and Hugging Face tokenizers: nothing lost, nothing too long, and a fingerprint that tells rules apart."""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from crossguard.configs.errors import UserError
from crossguard.configs.schema.encoders import ImageEncoderConfig, TextEncoderConfig
from crossguard.configs.schema.model import ModelConfig
from crossguard.data.loading.sample import RawSample
from crossguard.data.taxonomy import Policy, Taxonomy
from crossguard.train.encode import PostEncoder
from crossguard.train.tokenizers import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer

TEXTS = [
    "meet me at the river",
    "Wir treffen uns am Fluß",
    "встретимся у реки",
    "نلتقي عند النهر",
    "नदी पर मिलो",
    "在河边见",
    "👩‍👩‍👧 ok",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
BYTES = ByteTokenizer()


def text_of(ids: list[int]) -> str:
    return bytes(id - 3 for id in ids[1:-1]).decode("utf-8", errors="replace")


# -- bytes


@pytest.mark.parametrize("text", [*TEXTS, "", "\x00", "a\n\tb"])
def test_bytes_give_back_every_script(text: str) -> None:
    ids = BYTES.encode(text, 512)
    assert ids[0] == 1
    assert ids[-1] == 2
    assert text_of(ids) == text


@settings(max_examples=300)
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60), st.integers(4, 80))
def test_bytes_are_those_of_utf_8_up_to_the_length(text: str, max_length: int) -> None:
    ids = BYTES.encode(text, max_length)
    assert 2 <= len(ids) <= max_length
    assert bytes(id - 3 for id in ids[1:-1]) == text.encode()[: max_length - 2]
    assert all(0 < id < BYTES.vocab_size for id in ids)
    assert BYTES.pad_id not in ids


@settings(max_examples=100)
@given(st.text(alphabet=st.characters(), max_size=20))
def test_lone_surrogates_become_question_marks(text: str) -> None:
    ids = BYTES.encode(text, 256)
    assert text_of(ids) == "".join("?" if 0xD800 <= ord(c) <= 0xDFFF else c for c in text)


def test_a_long_text_is_cut_and_stays_closed() -> None:
    ids = BYTES.encode("é" * 100_000, 16)
    assert len(ids) == 16
    assert ids[-1] == 2
    assert BYTES.encode("é" * 7, 16) == ids


# -- of Hugging Face


def train_rules(words: list[str], *, specials: bool = True, lowercase: bool = False) -> HuggingFaceTokenizer:
    """A WordPiece tokenizer trained on a few words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    rules = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    if lowercase:
        rules.normalizer = normalizers.Lowercase()
    rules.train_from_iterator(words, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL))
    if specials:
        rules.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
    return HuggingFaceTokenizer(PreTrainedTokenizerFast(tokenizer_object=rules, **names), "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_rules(TEXTS).save(folder)
    return folder


def test_a_tokenizer_from_a_folder(folder: Path) -> None:
    tokenizer = load_tokenizer(TextEncoderConfig(tokenizer=str(folder)))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    for text in TEXTS:
        ids = tokenizer.encode(text, 64)
        assert ids[0] == 2
        assert ids[-1] == 3
        assert 1 not in ids or "👩" in text
        assert max(ids) < tokenizer.vocab_size
        short = tokenizer.encode(text, 4)
        assert len(short) == 4 or short == ids
        assert (short[0], short[-1]) == (2, 3)
    assert tokenizer.pad_id == 0
    assert tokenizer.encode("", 64) == [2, 3]
    assert tokenizer.encode("river \ud800", 64) == tokenizer.encode("river ?", 64)


def test_an_empty_text_is_never_nothing() -> None:
    bare = train_rules(TEXTS, specials=False)
    assert bare.encode("", 8) == [bare.pad_id]
    assert bare.encode("meet", 8) != [bare.pad_id]


def test_by_default_bytes_and_with_a_pretrained_encoder_its_own(folder: Path) -> None:
    assert isinstance(load_tokenizer(TextEncoderConfig(config={"model_type": "bert"})), ByteTokenizer)
    assert isinstance(load_tokenizer(TextEncoderConfig(pretrained=str(folder))), HuggingFaceTokenizer)
    assert isinstance(load_tokenizer(TextEncoderConfig(pretrained=str(folder), tokenizer="bytes")), ByteTokenizer)


def test_tokenizers_travel_between_processes(folder: Path) -> None:
    for tokenizer in (BYTES, load_tokenizer(TextEncoderConfig(tokenizer=str(folder)))):
        other = pickle.loads(pickle.dumps(tokenizer))
        assert other.fingerprint == tokenizer.fingerprint
        assert [other.encode(text, 32) for text in TEXTS] == [tokenizer.encode(text, 32) for text in TEXTS]


def test_what_was_saved_is_loaded_instead_of_what_is_named(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TextEncoderConfig(tokenizer=str(folder)))
    tokenizer.encode(TEXTS[0], 5)
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(TextEncoderConfig(tokenizer="gone/from-here"), tmp_path / "saved")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.vocab_size == tokenizer.vocab_size
    assert [again.encode(text, 32) for text in TEXTS] == [tokenizer.encode(text, 32) for text in TEXTS]
    BYTES.save(tmp_path / "bytes")
    assert json.loads((tmp_path / "bytes" / "byte_tokenizer.json").read_text())["vocab_size"] == 259
    assert isinstance(load_tokenizer(TextEncoderConfig(), tmp_path / "bytes"), ByteTokenizer)


def test_the_fingerprint_is_that_of_the_rules(folder: Path) -> None:
    standard = load_tokenizer(TextEncoderConfig(tokenizer=str(folder)))
    others = [
        train_rules(TEXTS[:3]).fingerprint,
        train_rules(TEXTS, specials=False).fingerprint,
        train_rules(TEXTS, lowercase=True).fingerprint,
        BYTES.fingerprint,
    ]
    assert standard.fingerprint not in others
    assert len(set(others)) == len(others)
    before = standard.fingerprint
    standard.encode(TEXTS[0], 4)
    assert HuggingFaceTokenizer(standard.tokenizer, "again").fingerprint == before  # type: ignore[attr-defined]


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.text\.tokenizer=.*nowhere: neither a folder with a tokenizer"):
        load_tokenizer(TextEncoderConfig(tokenizer=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"model\.text\.tokenizer=.*empty: ") as refusal:
        load_tokenizer(TextEncoderConfig(tokenizer=str(tmp_path / "empty")))
    assert "\n" not in str(refusal.value)


# -- the encoding of posts

TAXONOMY = Taxonomy("test", "1", tuple(Policy(name, "", "OTHER_VIOLATION_TC") for name in ("spam", "insult")))
CONFIG = ModelConfig(
    text=TextEncoderConfig(config={"model_type": "bert"}, max_length=32, prefix="query: "),
    image=ImageEncoderConfig(config={"model_type": "vit"}, size=16, max_images=2),
)


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), colour).save(buffer, "PNG")
    return buffer.getvalue()


def raw(text: str | None = "hello", images: tuple[str, ...] = ("red", "green", "blue")) -> RawSample:
    fields = {"id": "post/1", "language": "en", "labels": {"insult": 0.67}}
    return RawSample(fields, text, [picture(colour) for colour in images])


def test_a_post_becomes_numbers() -> None:
    encode = PostEncoder(CONFIG, TAXONOMY)
    sample = encode(raw())
    assert (sample.id, sample.language) == ("post/1", "en")
    assert sample.input_ids is not None
    assert sample.input_ids.dtype == np.int32
    assert text_of(sample.input_ids.tolist()) == "query: hello"
    assert [image.shape for image in sample.images] == [(3, 16, 16)] * 2
    assert sample.images[0][:, 0, 0].tolist() == [255, 0, 0]
    assert np.isnan(sample.labels[0])
    assert sample.labels[1] == np.float32(0.67)
    nothing = encode(raw(None, ()))
    assert nothing.input_ids is None
    assert nothing.images == []
    assert encode.text_length(raw(None)) == 0
    for text in ("", "hello", "long " * 20):
        sample = encode(raw(text))
        assert sample.input_ids is not None
        assert encode.text_length(raw(text)) == len(sample.input_ids) <= 32


def test_what_the_model_does_not_look_at_is_not_encoded() -> None:
    text_only = PostEncoder(replace(CONFIG, modalities=["text"]), TAXONOMY)
    broken = RawSample({"id": "1", "labels": {}}, "hello", [b"no picture"])
    assert text_only(broken).images == []
    image_only = PostEncoder(replace(CONFIG, modalities=["image"]), TAXONOMY)
    assert image_only(raw()).input_ids is None
    assert image_only.text_length(raw()) == 0


def test_the_encodings_fingerprint_changes_with_whatever_changes_a_number(folder: Path) -> None:
    fewer = replace(TAXONOMY, policies=TAXONOMY.policies[::-1])
    encoders = [
        PostEncoder(CONFIG, TAXONOMY),
        PostEncoder(CONFIG, fewer),
        PostEncoder(replace(CONFIG, modalities=["text"]), TAXONOMY),
        PostEncoder(replace(CONFIG, modalities=["image"]), TAXONOMY),
        PostEncoder(replace(CONFIG, text=replace(CONFIG.text, prefix="")), TAXONOMY),
        PostEncoder(replace(CONFIG, text=replace(CONFIG.text, max_length=33)), TAXONOMY),
        PostEncoder(replace(CONFIG, text=replace(CONFIG.text, tokenizer=str(folder))), TAXONOMY),
        PostEncoder(replace(CONFIG, image=replace(CONFIG.image, size=17)), TAXONOMY),
        PostEncoder(replace(CONFIG, image=replace(CONFIG.image, max_images=1)), TAXONOMY),
    ]
    assert len({encode.fingerprint for encode in encoders}) == len(encoders)
    # Nor does it change with what is computed on the numbers later.
    assert PostEncoder(replace(CONFIG, modality_dropout=0.5), TAXONOMY).fingerprint == encoders[0].fingerprint
    again = pickle.loads(pickle.dumps(encoders[6]))
    assert again.fingerprint == encoders[6].fingerprint
    assert again.text_length(raw()) == encoders[6].text_length(raw())
