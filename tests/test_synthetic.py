"""The generated posts: the same every time, and exactly balanced, so that neither text nor picture tells a label."""

from __future__ import annotations

import io
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

import pytest
from PIL import Image

from crossguard.configs.errors import UserError
from crossguard.configs.schema.data import DataConfig
from crossguard.data.records import parse_post
from crossguard.data.sources import open_source, synthetic
from crossguard.data.sources.synthetic import POLICIES, SyntheticSource
from crossguard.data.sources.synthetic_texts import PHRASES
from crossguard.data.taxonomy import Policy, Taxonomy

TAXONOMY = Taxonomy("stand_ins", "1", tuple(Policy(name, "", "OTHER_VIOLATION_TC") for name in POLICIES))
SMALL = {"train_posts": 280, "validation_posts": 28, "test_posts": 56, "unseen_posts": 32}
Post = dict[str, Any]
# What the picture shows: (weather, fruit), by its bytes.
Content = dict[bytes, tuple[int, int]]


def source(seed: int = 0, taxonomy: Taxonomy = TAXONOMY, **options: Any) -> SyntheticSource:
    opened = open_source(DataConfig(source="synthetic", options=options), taxonomy, seed)
    assert isinstance(opened, SyntheticSource)
    return opened


def posts_of(opened: SyntheticSource) -> list[Post]:
    posts = []
    for record in opened.records():
        assert record.error is None
        assert record.raw is not None
        posts.append(record.raw)
    return posts


@pytest.fixture(scope="module")
def drawn() -> tuple[list[Post], Content]:
    """The default posts, and what was drawn into each picture, noted as it was drawn."""
    content: Content = {}
    draw = synthetic.draw_stall

    def note(weather: int, fruit: int, *rest: Any) -> bytes:
        data = draw(weather, fruit, *rest)
        content[data] = (weather, fruit)
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "draw_stall", note)
        return posts_of(source()), content


@pytest.fixture(scope="module")
def posts(drawn: tuple[list[Post], Content]) -> list[Post]:
    return drawn[0]


def said(post: Post) -> tuple[int, int]:
    """Which weather and which fruit the text names, read off its words."""
    phrases = PHRASES[post["language"]]
    found = []
    for words in (phrases.weather, phrases.fruit):
        here = [number for number, word in enumerate(words) if word in post["text"]]
        assert len(here) == 1, post["id"]
        found.append(here[0])
    return found[0], found[1]


def assert_balanced(posts: list[Post], cue: Callable[[Post], Hashable]) -> None:
    """Whoever knows only `cue` of a post is right in exactly half of the known labels, in every split and language."""
    counts: dict[Hashable, list[int]] = defaultdict(lambda: [0, 0])
    for post in posts:
        for policy, label in post["labels"].items():
            if label is not None:
                assert label in (0.0, 1.0)
                counts[post["split"], post["language"], policy, cue(post)][int(label)] += 1
    assert counts
    assert [key for key, (benign, violating) in counts.items() if benign != violating] == []


def test_the_same_seed_gives_the_same_posts_and_another_seed_others() -> None:
    first, second = posts_of(source(5, **SMALL)), posts_of(source(5, **SMALL))
    assert first == second
    opened = source(5, **SMALL)
    assert list(opened.records()) == list(opened.records())
    other = posts_of(source(6, **SMALL))
    assert [post["id"] for post in other] == [post["id"] for post in first]
    assert {post["image"] for post in other}.isdisjoint(post["image"] for post in first)
    assert [post["text"] for post in other] != [post["text"] for post in first]


def test_more_posts_of_one_split_change_no_other() -> None:
    first, more = posts_of(source(**SMALL)), posts_of(source(**{**SMALL, "test_posts": 112}))
    assert [post for post in more if post["split"] != "test"] == [post for post in first if post["split"] != "test"]
    assert len(more) == len(first) + 56


def test_label_noise_turns_training_labels_alone_by_their_id() -> None:
    clean, noisy = posts_of(source(**SMALL)), posts_of(source(**SMALL, label_noise=0.2))
    assert [post | {"labels": None} for post in noisy] == [post | {"labels": None} for post in clean]
    turned: dict[str, list[bool]] = defaultdict(list)
    for one, other in zip(clean, noisy, strict=True):
        for policy in POLICIES:
            before, after = one["labels"][policy], other["labels"][policy]
            assert (before is None) == (after is None)
            if before is not None:
                turned[one["split"]].append(before != after)
    share = sum(turned["train"]) / len(turned["train"])
    assert share == pytest.approx(0.2, abs=4 * (0.16 / len(turned["train"])) ** 0.5)
    assert not any(one for split, changes in turned.items() if split != "train" for one in changes)
    more = {post["id"]: post["labels"] for post in posts_of(source(**{**SMALL, "train_posts": 448}, label_noise=0.2))}
    assert all(more[post["id"]] == post["labels"] for post in noisy)


def test_the_fingerprint_changes_with_seed_options_and_policies() -> None:
    one_policy = Taxonomy("one", "1", TAXONOMY.policies[:1])
    fingerprints = {
        source().fingerprint(),
        source(1).fingerprint(),
        source(test_posts=56).fingerprint(),
        source(unseen_posts=56).fingerprint(),
        source(label_noise=0.05).fingerprint(),
        source(taxonomy=one_policy).fingerprint(),
    }
    assert len(fingerprints) == 6
    assert source().fingerprint() == source().fingerprint()


def test_enough_posts_languages_and_scripts(posts: list[Post]) -> None:
    languages: dict[str, set[str]] = defaultdict(set)
    for post in posts:
        languages[post["split"]].add(post["language"])
    assert set(languages) == {"train", "validation", "test", "unseen_language"}
    assert languages["train"] == languages["validation"] == languages["test"]
    assert len(languages["train"]) >= 6
    assert len(languages["unseen_language"]) == 1
    assert languages["unseen_language"].isdisjoint(languages["train"])
    scripts = {
        unicodedata.name(letter).split()[0]
        for post in posts
        if post["split"] == "train"
        for letter in post["text"]
        if letter.isalpha()
    }
    assert len(scripts) >= 4
    assert sum(post["split"] == "test" for post in posts) >= 1000
    assert len({post["id"] for post in posts}) == len(posts)


def test_labels_are_what_text_and_picture_say_together(drawn: tuple[list[Post], Content]) -> None:
    posts, content = drawn
    for post in posts:
        truth = [float(word != sight) for word, sight in zip(said(post), content[post["image"]], strict=True)]
        for policy, expected in zip(POLICIES, truth, strict=True):
            assert post["labels"][policy] in (expected, None), post["id"]


def test_no_text_and_no_picture_tells_a_label(drawn: tuple[list[Post], Content]) -> None:
    posts, content = drawn
    assert_balanced(posts, lambda post: None)
    assert_balanced(posts, lambda post: post["text"])
    assert_balanced(posts, said)
    assert_balanced(posts, lambda post: post["image"])
    assert_balanced(posts, lambda post: content[post["image"]])
    # Nor does anything else that lies beside them.
    assert_balanced(posts, lambda post: (Image.open(io.BytesIO(post["image"])).format, len(post["image"]) // 200))
    assert_balanced(posts, lambda post: (post["created_at"], post["region"], post["source"], post["licence"]))


def test_quadruples_are_two_texts_times_two_pictures_and_stay_together(posts: list[Post]) -> None:
    groups: dict[str, list[Post]] = defaultdict(list)
    for post in posts:
        groups[post["group"]].append(post)
    for members in groups.values():
        assert len(members) == 4
        assert len({post["split"] for post in members}) == len({post["language"] for post in members}) == 1
        pairs = {(post["text"], post["image"]) for post in members}
        assert len(pairs) == 4
        assert len({text for text, _ in pairs}) == len({image for _, image in pairs}) == 2
    # No picture stands in two quadruples.
    assert len({post["image"] for post in posts}) == 2 * len(groups)


def test_some_labels_are_unknown_in_whole_quadruples(posts: list[Post]) -> None:
    for policy in POLICIES:
        for split in ("train", "validation", "test", "unseen_language"):
            labels = [post["labels"][policy] for post in posts if post["split"] == split]
            assert 0.05 <= labels.count(None) / len(labels) <= 0.4, (policy, split)
        unknown = defaultdict(set)
        for post in posts:
            unknown[post["group"]].add(post["labels"][policy] is None)
        assert all(len(states) == 1 for states in unknown.values())


def test_posts_hold_to_the_contract_and_may_be_used(posts: list[Post]) -> None:
    for raw in posts:
        post = parse_post(raw, TAXONOMY)
        assert post.consent is True
        assert not post.restricted
        assert post.expires_at is None
        assert post.licence
        assert post.source
        assert len(post.images) == 1
        assert set(post.labels) == {policy for policy, label in raw["labels"].items() if label is not None}


def test_pictures_are_of_two_formats_and_can_be_decoded(posts: list[Post]) -> None:
    formats = set()
    for post in posts[::40]:
        image = Image.open(io.BytesIO(post["image"]))
        image.load()
        formats.add(image.format)
    assert formats == {"PNG", "JPEG"}


def test_a_taxonomy_may_ask_for_one_of_the_policies_in_any_order() -> None:
    one = Taxonomy("one", "1", TAXONOMY.policies[1:])
    assert {tuple(post["labels"]) for post in posts_of(source(taxonomy=one, **SMALL))} == {POLICIES[1:]}
    foreign = Taxonomy("other", "1", (*TAXONOMY.policies, Policy("spam", "", "OTHER_VIOLATION_TC")))
    with pytest.raises(UserError, match=r"taxonomy\.policies: data\.source=synthetic has no labels for 'spam'"):
        source(taxonomy=foreign)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_post": 10}, r"train_post.*did you mean 'train_posts'"),
        ({"test_posts": -1}, r"data\.options\.test_posts=-1: must be a whole number"),
        ({"test_posts": "many"}, r"data\.options\.test_posts=many: must be a whole number"),
        ({"label_noise": 2}, r"data\.options\.label_noise=2: must be a number from 0 to 1"),
        ({"test_posts": True}, r"data\.options\.test_posts=True: must be a whole number"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        source(**options)
