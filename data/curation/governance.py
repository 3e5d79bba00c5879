"""Which posts may be used at all. Closed by default: what may not be read is never written to a shard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crossguard.data.records import Post, epoch_seconds

RESTRICTED, NO_CONSENT, EXPIRED = "restricted", "no_consent", "expired"
RULES = (RESTRICTED, NO_CONSENT, EXPIRED)


def left_out_by(post: Post, now: float) -> str | None:
    """The rule that keeps a post out of the shards, or None.

    A restricted post carries hashes, never content (`parse_post` sees to that), so there is nothing to train on.

    Args:
        post: a valid post.
        now: seconds since 1970.
    """
    return _rule(post.restricted, post.consent, post.expires_at, now)


def refused_at_read(fields: Mapping[str, Any], now: float) -> str | None:
    """The same rules once more when a post is read from a shard, from its fields as they stand there."""
    return _rule(bool(fields.get("restricted")), fields.get("consent"), fields.get("expires_at"), now)


def _rule(restricted: bool, consent: bool | None, expires_at: str | None, now: float) -> str | None:
    if restricted:
        return RESTRICTED
    if consent is False:
        return NO_CONSENT
    if expires_at is not None and epoch_seconds(expires_at) <= now:
        return EXPIRED
    return None
