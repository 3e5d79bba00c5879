"""Posts: the record that every source is turned into, and the one place that says what a valid post is."""

from __future__ import annotations

import hashlib
import json
import os.path
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from crossguard.configs.schema.build import SPLIT_NAME
from crossguard.configs.schema.encoders import FURTHER_TEXTS
from crossguard.configs.suggest import did_you_mean
from crossguard.data.implied_labels import complete_labels
from crossguard.data.taxonomy import Taxonomy

# A media item: a path relative to the folder of the posts' file, or the bytes themselves.
Media = str | bytes

MEDIA_FIELDS = ("image", "images", "video", "audio")
TEXT_FIELDS = (
    *("id", "text", "ocr", "transcript", "language", "split", "group"),
    *("created_at", "source", "licence", "region", "expires_at"),
)
LIST_FIELDS = ("comments",)
# What a post says, and what it shows: never in logs, and never in a restricted post.
CONTENT_FIELDS = ("text", *FURTHER_TEXTS, *MEDIA_FIELDS)
FLAG_FIELDS = ("consent", "restricted")
OBJECT_FIELDS = ("labels", "severity", "meta")
FIELDS = frozenset(MEDIA_FIELDS + TEXT_FIELDS + LIST_FIELDS + FLAG_FIELDS + OBJECT_FIELDS)

UNDETERMINED = "und"  # BCP 47's tag for a language that nobody named
# Half of the name of a stratum, which may hold no separators.
LANGUAGE_TAG = re.compile(r"[A-Za-z0-9]{1,8}([-_][A-Za-z0-9]{1,8})*")

_encode = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def canonical_json(value: Any) -> bytes:
    """The one way a JSON value is written where bytes must be the same every time: sorted keys, no spaces, UTF-8."""
    return _encode(value).encode()


def post_key(id: str) -> bytes:
    """The 16 bytes that stand for an id in shards, since ids may hold dots, slashes and any script."""
    return hashlib.blake2b(id.encode(), digest_size=16).digest()


def epoch_seconds(timestamp: str) -> int:
    """Seconds since 1970 of an ISO 8601 date or time; UTC where it names no offset.

    Raises:
        ValueError: it is no ISO 8601 date or time.
    """
    moment = datetime.fromisoformat(timestamp)
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() // 1)


class RecordError(ValueError):
    """Everything that is wrong with one record, as (field, message) pairs. Never holds what a post says."""

    def __init__(self, errors: list[tuple[str, str]]):
        super().__init__("; ".join(f"{name}: {message}" for name, message in errors))
        self.errors = errors


@dataclass(frozen=True, slots=True)
class Post:
    """One labeled item. A policy missing from `labels` is unknown, not benign."""

    id: str
    # The caption.
    text: str | None = None
    # What can be read on screen.
    ocr: str | None = None
    # What is said in a video or recording.
    transcript: str | None = None
    comments: tuple[str, ...] = ()
    language: str = UNDETERMINED
    images: tuple[Media, ...] = ()
    video: Media | None = None
    audio: Media | None = None
    labels: dict[str, float] = field(default_factory=dict)
    severity: dict[str, int] = field(default_factory=dict)
    split: str | None = None
    group: str | None = None
    created_at: str | None = None
    source: str | None = None
    licence: str | None = None
    region: str | None = None
    consent: bool | None = None
    expires_at: str | None = None
    restricted: bool = False
    meta: dict[str, Any] = field(default_factory=dict)

    def media(self) -> list[tuple[str, Media]]:
        """Every media item of the post with its field: image, images[0] and so on of several, video, audio."""
        several = len(self.images) > 1
        items = [(f"images[{number}]" if several else "image", item) for number, item in enumerate(self.images)]
        items += [("video", self.video)] if self.video is not None else []
        return items + ([("audio", self.audio)] if self.audio is not None else [])

    def further_texts(self) -> dict[str, Any]:
        """What is written in the post beside its caption, by field; what is absent is left out."""
        return {name: value for name in FURTHER_TEXTS if (value := getattr(self, name))}

    def to_json(self) -> dict[str, Any]:
        """Everything but text and media, in the contract's shape; what is absent is left out."""
        record: dict[str, Any] = {"id": self.id, "language": self.language, "labels": self.labels}
        for name in _OPTIONAL:
            value = getattr(self, name)
            if value is not None and value != {}:
                record[name] = value
        if self.restricted:
            record["restricted"] = True
        return record


_OPTIONAL = (
    "severity",
    "split",
    "group",
    "created_at",
    "source",
    "licence",
    "region",
    "consent",
    "expires_at",
    "meta",
)


def parse_post(raw: Mapping[str, Any], taxonomy: Taxonomy) -> Post:
    """Check a record in the contract's JSON shape and make a `Post` of it.

    A label is 1, 0, a fraction between them, true or false (1 and 0), or null for unknown; labels that others imply are
    added (`implied_labels`). Empty text is no text.

    Raises:
        RecordError: with all that is wrong, not only the first.
    """
    fields = _Fields(raw)
    text = {name: fields.string(name) for name in TEXT_FIELDS if name in raw}
    images = fields.images()
    severity = fields.by_policy("severity", taxonomy, _severity)
    labels, contradictions = complete_labels(taxonomy, fields.by_policy("labels", taxonomy, _label), severity)
    fields.errors += contradictions
    post = Post(
        id=text.get("id") or "",
        text=text.get("text"),
        ocr=text.get("ocr"),
        transcript=text.get("transcript"),
        comments=fields.strings("comments"),
        language=text.get("language") or UNDETERMINED,
        images=images,
        video=fields.media("video"),
        audio=fields.media("audio"),
        labels=labels,
        severity=severity,
        split=text.get("split"),
        group=text.get("group"),
        created_at=text.get("created_at"),
        source=text.get("source"),
        licence=text.get("licence"),
        region=text.get("region"),
        consent=fields.flag("consent"),
        expires_at=text.get("expires_at"),
        restricted=bool(fields.flag("restricted")),
        meta=fields.meta(),
    )
    fields.check_whole(post)
    if fields.errors:
        raise RecordError(fields.errors)
    return post


class _Fields:
    """Reads the fields of one raw record and gathers what is wrong with them."""

    def __init__(self, raw: Mapping[str, Any]):
        self.raw = raw
        self.errors: list[tuple[str, str]] = []
        for name in raw.keys() - FIELDS:
            hint = did_you_mean(str(name), FIELDS)
            self.wrong(_shown(name), f"unknown field; {hint} (free-form data goes under meta)")

    def wrong(self, name: str, message: str) -> None:
        self.errors.append((name, message))

    def strings(self, name: str) -> tuple[str, ...]:
        value = self.raw.get(name)
        if value is None:
            return ()
        if not isinstance(value, list | tuple):
            self.wrong(name, f"must be a list of strings, not {_kind(value)}")
            return ()
        items = [self._string(f"{name}[{number}]", item) for number, item in enumerate(value)]
        return tuple(item for item in items if item is not None)

    def string(self, name: str) -> str | None:
        return self._string(name, self.raw[name])

    def _string(self, name: str, value: Any) -> str | None:
        if value is None:
            return None
        if not isinstance(value, str):
            self.wrong(name, f"must be a string, not {_kind(value)}")
            return None
        if not value.strip():
            return None
        check = _STRING_CHECKS.get(name)
        message = _unicode_error(value) or (check(value) if check else None)
        if message:
            self.wrong(name, message)
            return None
        return value

    def flag(self, name: str) -> bool | None:
        value = self.raw.get(name)
        if value is not None and not isinstance(value, bool):
            self.wrong(name, f"must be true, false or null, not {_kind(value)}")
            return None
        return value

    def media(self, name: str) -> Media | None:
        return self._media_item(name, self.raw.get(name))

    def images(self) -> tuple[Media, ...]:
        one, several = self.media("image"), self.raw.get("images")
        if several is None:
            return () if one is None else (one,)
        if one is not None:
            self.wrong("images", "give image or images, not both")
        if not isinstance(several, list | tuple):
            self.wrong("images", f"must be a list, not {_kind(several)}")
            return ()
        items = [self._media_item(f"images[{number}]", item, required=True) for number, item in enumerate(several)]
        return tuple(item for item in items if item is not None)

    def _media_item(self, name: str, value: Any, required: bool = False) -> Media | None:
        if isinstance(value, str):
            message = _path_error(value)
        elif isinstance(value, bytes) or (value is None and not required):
            return value
        else:
            message = f"must be a path, not {_kind(value)}"
        if message:
            self.wrong(name, message)
            return None
        return value

    def by_policy(self, name: str, taxonomy: Taxonomy, convert: Callable[[Any], Any]) -> dict[str, Any]:
        """The values of `labels` or `severity`; unknown ones (null) are left out."""
        given = self.raw.get(name)
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            self.wrong(name, f"must be an object of policies, not {_kind(given)}")
            return {}
        policies, values = taxonomy.names, {}
        for policy, value in given.items():
            if policy not in policies:
                hint = did_you_mean(str(policy), policies)
                self.wrong(f"{name}.{_shown(policy)}", f"no policy of taxonomy '{taxonomy.name}'; {hint}")
            elif value is not None:
                try:
                    values[policy] = convert(value)
                except ValueError as error:
                    self.wrong(f"{name}.{policy}", str(error))
        return values

    def meta(self) -> dict[str, Any]:
        value = self.raw.get("meta")
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.wrong("meta", f"must be an object, not {_kind(value)}")
            return {}
        try:
            canonical_json(value)
        except (TypeError, ValueError, RecursionError):
            self.wrong("meta", "holds something that JSON cannot carry")
        return value

    def check_whole(self, post: Post) -> None:
        """The rules that look at more than one field."""
        wrong_already = {name.partition("[")[0] for name, _ in self.errors}
        if not post.id and "id" not in wrong_already:
            self.wrong("id", "missing")
        if self.raw.get("labels") is None:
            self.wrong("labels", "missing; write {} when no label is known")
        if post.restricted:
            held = [name for name in CONTENT_FIELDS if self.raw.get(name)]
            if held:
                self.wrong("restricted", f"a restricted post carries hashes under meta, never {' or '.join(held)}")
        elif not (post.text or post.further_texts() or post.media()) and not wrong_already & set(CONTENT_FIELDS):
            self.wrong("text", "the post has neither text nor image, video or audio")


def _kind(value: Any) -> str:
    """What JSON calls the type of a value; the value itself may be what a post says, and stays out of messages."""
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def _shown(name: Any) -> str:
    """A key or a number as a message may show it: short, on one line."""
    text = str(name)[:40]
    return text if text.isprintable() else ascii(text)


def _label(value: Any) -> float:
    if not isinstance(value, int | float):
        raise ValueError(f"must be a number between 0 and 1 or null, not {_kind(value)}")
    if not 0 <= value <= 1:
        raise ValueError(f"must lie between 0 and 1, not {_shown(value)}")
    return float(value)


def _severity(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise ValueError(
            f"must be a whole number, not {_kind(value) if not isinstance(value, float) else 'a fraction'}"
        )
    if value < 0:
        raise ValueError(f"must not be below 0, as {_shown(value)} is")
    return int(value)


def _unicode_error(value: str) -> str | None:
    try:
        value.encode()
    except UnicodeEncodeError:
        return "is no valid Unicode (not UTF-8, or half of a surrogate pair)"
    return None


def _path_error(path: str) -> str | None:
    if not path or "\0" in path:
        return "must be a path, not an empty one" if not path else "holds a NUL character"
    if "://" in path:
        return "must be a path relative to the posts' folder, not a URL"
    if os.path.isabs(path) or re.match(r"[A-Za-z]:[\\/]|\\", path):
        return "must be relative to the posts' folder, not absolute"
    if os.path.normpath(path).split(os.sep)[0] == os.pardir:
        return "leaves the posts' folder"
    return _unicode_error(path)


def _time_error(value: str) -> str | None:
    try:
        epoch_seconds(value)
    except (ValueError, OverflowError):
        return "must be an ISO 8601 date or time, such as 2026-01-31T10:00:00Z"
    return None


def _split_error(value: str) -> str | None:
    return None if SPLIT_NAME.fullmatch(value) else "must be a name of letters, digits, '-' and '_'"


def _language_error(value: str) -> str | None:
    return None if LANGUAGE_TAG.fullmatch(value) else "must be a language tag, such as de or ur-Latn"


_STRING_CHECKS: dict[str, Callable[[str], str | None]] = {
    "language": _language_error,
    "split": _split_error,
    "created_at": _time_error,
    "expires_at": _time_error,
}
