"""Which posts may be used at all. Closed by default: what may not be read is never written to a shard."""

from __future__ import annotations

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
    if post.restricted:
        return RESTRICTED
    if post.consent is False:
        return NO_CONSENT
    if post.expires_at is not None and epoch_seconds(post.expires_at) <= now:
        return EXPIRED
    return None
