"""Posts and taxonomies: what is valid, what is refused and how it is told."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossguard.configs.errors import UserError
from crossguard.configs.schema.taxonomy import PolicyConfig, TaxonomyConfig
from crossguard.data.curation.governance import left_out_by
from crossguard.data.curation.splits import Splitter
from crossguard.data.records import Post, RecordError, canonical_json, epoch_seconds, parse_post, post_key
from crossguard.data.taxonomy import Taxonomy

TAXONOMY = Taxonomy.from_config(
    TaxonomyConfig(name="test", policies=[PolicyConfig(name=name) for name in ("hate", "harassment", "self_harm")])
)
SECRET = "words of the post"
CONTRACT = json.loads("""
{"id": "p1", "text": "…", "language": "de", "image": "img/1.jpg", "images": null, "video": null, "audio": null,
 "labels": {"hate": 1, "harassment": 0, "self_harm": null}, "severity": {"hate": 2}, "split": "train",
 "group": "author-17", "created_at": "2026-01-31T10:00:00Z", "source": "reports", "licence": "CC-BY-4.0",
 "region": "EU", "consent": true, "expires_at": null, "restricted": false, "meta": {"any": "thing"}}
""")


def errors_of(**fields: Any) -> dict[str, str]:
    """What is wrong with a post that is right but for `fields`, by field."""
    raw = {"id": "p", "text": SECRET, "labels": {}, **fields}
    with pytest.raises(RecordError) as caught:
        parse_post(raw, TAXONOMY)
    assert SECRET not in str(caught.value)
    return dict(caught.value.errors)


def test_the_contracts_example_is_read_in_full() -> None:
    post = parse_post(CONTRACT, TAXONOMY)
    assert post.labels == {"hate": 1.0, "harassment": 0.0}  # null is unknown, not benign
    assert post.images == ("img/1.jpg",)
    assert post.severity == {"hate": 2}
    assert post.to_json() == {
        name: value
        for name, value in {**CONTRACT, "labels": post.labels}.items()
        if value not in (None, False) and name not in ("text", "image")
    }


def test_only_id_one_modality_and_labels_are_required() -> None:
    post = parse_post({"id": "p", "audio": "a.flac", "labels": {}}, TAXONOMY)
    assert post == Post(id="p", audio="a.flac")
    assert post.language == "und"


def test_missing_fields_are_all_named() -> None:
    with pytest.raises(RecordError) as caught:
        parse_post({}, TAXONOMY)
    assert {name for name, _ in caught.value.errors} == {"id", "text", "labels"}


def test_empty_text_is_no_text() -> None:
    assert "text" in errors_of(text=" \n")
    assert parse_post({"id": "p", "text": "", "image": "a.png", "labels": {}}, TAXONOMY).text is None


def test_what_is_written_beside_the_caption_is_text_and_never_among_the_fields() -> None:
    post = parse_post({"id": "p", "comments": ["one", " ", "two"], "transcript": "", "labels": {}}, TAXONOMY)
    assert post == Post("p", comments=("one", "two"))
    assert post.further_texts() == {"comments": ("one", "two")}
    every = parse_post({"id": "p", "ocr": SECRET, "transcript": SECRET, "comments": [SECRET], "labels": {}}, TAXONOMY)
    assert SECRET not in json.dumps(every.to_json())


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"lables": {}}, "lables", "did you mean 'labels'"),
        ({"labels": {"hat": 1}}, "labels.hat", "did you mean 'hate'"),
        ({"labels": {"hate": 1.5}}, "labels.hate", "between 0 and 1, not 1.5"),
        ({"labels": {"hate": float("nan")}}, "labels.hate", "between 0 and 1"),
        ({"labels": {"hate": SECRET}}, "labels.hate", "not a string"),
        ({"labels": [1]}, "labels", "must be an object"),
        ({"labels": None}, "labels", "missing"),
        ({"severity": {"hate": -1}}, "severity.hate", "below 0"),
        ({"severity": {"hate": 1.5}}, "severity.hate", "whole number"),
        ({"severity": {"hate": True}}, "severity.hate", "whole number"),
        ({"id": 7}, "id", "must be a string, not a number"),
        ({"text": [SECRET]}, "text", "must be a string, not a list"),
        ({"text": "\ud800"}, "text", "no valid Unicode"),
        ({"language": "de/at"}, "language", "language tag"),
        ({"split": "../train"}, "split", "must be a name"),
        ({"split": ".build"}, "split", "must be a name"),
        ({"created_at": "31.1.2026"}, "created_at", "ISO 8601"),
        ({"expires_at": "soon"}, "expires_at", "ISO 8601"),
        ({"consent": 1}, "consent", "true, false or null"),
        ({"meta": SECRET}, "meta", "must be an object"),
        ({"meta": {"a": object()}}, "meta", "JSON cannot carry"),
        ({"image": "/etc/passwd"}, "image", "not absolute"),
        ({"image": "C:\\a.jpg"}, "image", "not absolute"),
        ({"image": "a/../../b.jpg"}, "image", "leaves"),
        ({"image": "https://example.org/a.jpg"}, "image", "not a URL"),
        ({"image": ""}, "image", "empty"),
        ({"image": "\ud800.png"}, "image", "no valid Unicode"),
        ({"meta": {"a": "\ud800"}}, "meta", "JSON cannot carry"),
        ({"labels": {"hate": 10**400}}, "labels.hate", "not 1000"),
        ({"a\nb": 1}, "'a\\nb'", "unknown field"),
        ({"images": ["a.jpg", None]}, "images[1]", "must be a path, not null"),
        ({"image": "a.jpg", "images": ["b.jpg"]}, "images", "not both"),
        ({"restricted": True}, "restricted", "never text"),
        ({"restricted": True, "text": None, "image": "a.jpg"}, "restricted", "never image"),
        ({"restricted": True, "text": None, "transcript": SECRET}, "restricted", "never transcript"),
        ({"restricted": True, "text": None, "comments": [SECRET]}, "restricted", "never comments"),
        ({"ocr": [SECRET]}, "ocr", "must be a string, not a list"),
        ({"comments": SECRET}, "comments", "must be a list of strings, not a string"),
        ({"comments": ["a", 7]}, "comments[1]", "must be a string, not a number"),
        ({"comments": ["\ud800"]}, "comments[0]", "no valid Unicode"),
    ],
)
def test_what_is_wrong_is_named_with_its_field(fields: dict[str, Any], field: str, message: str) -> None:
    errors = errors_of(**fields)
    assert list(errors) == [field]
    assert message in errors[field]


def test_booleans_and_fractions_are_labels() -> None:
    labels = parse_post({"id": "p", "text": "t", "labels": {"hate": True, "harassment": 1 / 3}}, TAXONOMY).labels
    assert labels == {"hate": 1.0, "harassment": 1 / 3}


def test_governance_leaves_out_what_may_not_be_read() -> None:
    restricted = parse_post({"id": "p", "labels": {"hate": 1}, "restricted": True, "meta": {"pdq": "ff"}}, TAXONOMY)
    now = epoch_seconds("2026-01-31T10:00:00Z")
    assert left_out_by(restricted, now) == "restricted"
    assert left_out_by(Post("p", consent=False), now) == "no_consent"
    assert left_out_by(Post("p", expires_at="2026-01-31T12:00:00+02:00"), now) == "expired"
    assert left_out_by(Post("p", expires_at="2026-01-31T10:00:01"), now) is None
    assert left_out_by(Post("p", consent=True), now) is None


def test_splits_depend_on_the_group_alone_and_keep_their_shares() -> None:
    splitter = Splitter({"train": 0.8, "validation": 0.1, "test": 0.1})
    swapped = Splitter({"test": 0.1, "validation": 0.1, "train": 0.8})
    splits = [splitter.split_of(Post(str(number))) for number in range(5000)]
    assert splits == [swapped.split_of(Post(str(number))) for number in range(5000)]
    assert abs(splits.count("train") / 5000 - 0.8) < 0.02
    assert len({splitter.split_of(Post(str(number), group="author")) for number in range(100)}) == 1
    assert splitter.split_of(Post("1", split="unseen_language")) == "unseen_language"
    # The posts with the smallest keys, which data.limit takes, are spread over all splits.
    first = sorted(range(5000), key=lambda number: post_key(str(number)))[:500]
    assert abs(sum(splits[number] == "train" for number in first) / 500 - 0.8) < 0.06


def test_taxonomy_round_trip_and_label_vector() -> None:
    assert Taxonomy.from_json(json.loads(canonical_json(TAXONOMY.to_json()))) == TAXONOMY
    vector = TAXONOMY.label_vector({"self_harm": 0.5, "hate": 0.0, "harassment": None})
    assert vector.dtype == np.float32
    np.testing.assert_array_equal(vector, np.array([0, np.nan, 0.5], dtype=np.float32))
    with pytest.raises(UserError, match="benign"):
        Taxonomy.from_config(TaxonomyConfig(name="t", policies=[PolicyConfig(name="benign")]))


TEXTS = st.text(min_size=1).filter(str.strip)
POLICIES = st.sampled_from(TAXONOMY.names)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
POSTS = st.builds(
    Post,
    id=TEXTS,
    text=TEXTS,
    language=st.sampled_from(["und", "de", "ur-Latn", "zh-Hant-TW"]),
    labels=st.dictionaries(POLICIES, st.floats(0, 1)),
    severity=st.dictionaries(POLICIES, st.integers(0, 9)),
    split=st.none() | st.sampled_from(["train", "test", "unseen_language"]),
    group=st.none() | TEXTS,
    created_at=st.none() | st.datetimes().map(lambda moment: moment.isoformat()),
    consent=st.none() | st.booleans(),
    meta=st.dictionaries(TEXTS, JSON_VALUES, max_size=3),
)


@given(POSTS)
def test_a_post_survives_json(post: Post) -> None:
    record = json.loads(canonical_json(post.to_json()))
    assert parse_post({**record, "text": post.text}, TAXONOMY) == post


@given(st.dictionaries(st.sampled_from(sorted(CONTRACT)) | TEXTS, JSON_VALUES))
def test_any_json_object_is_a_post_or_a_record_error(raw: dict[str, Any]) -> None:
    with contextlib.suppress(RecordError):
        parse_post(raw, TAXONOMY)
