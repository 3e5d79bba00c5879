"""The reference: learns from known labels, takes its strength from validation, and copes with posts without text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build_job import make_config, picture, write_lines
from sklearn.metrics import roc_auc_score

from crossguard.data.loading.reader import ShardReader
from crossguard.data.shards.build import build_shards
from crossguard.data.shards.folder import ShardFolder
from crossguard.data.taxonomy import Taxonomy
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.evaluation.references import read_texts, tfidf_logistic_regression

WORDS = {"en": ["river", "morning", "friend", "bread"], "hi": ["नदी", "सुबह", "दोस्त", "रोटी"]}
MARKS = {"en": "zigzag", "hi": "टेढ़ा"}


def make_posts(splits: dict[str, int]) -> list[dict[str, Any]]:
    """A word gives `hate` away, in either language; `spam` is never known, or nobody ever violated it."""
    draw = random.Random(0)
    posts = []
    for split, count in splits.items():
        for number in range(count):
            language = draw.choice(list(WORDS))
            bad = draw.random() < 0.3
            words = draw.choices(WORDS[language], k=5) + [MARKS[language]] * bad
            labels = {"hate": draw.choice([bad * 0.67, None if draw.random() < 0.2 else float(bad)])}
            post = {"id": f"{split}/{number}", "language": language, "text": " ".join(words), "split": split}
            posts.append(post | {"labels": labels | ({"spam": 0} if number % 2 else {})})
    return posts


def fit(folder: Path, posts: list[dict[str, Any]]) -> tuple[dict[str, Predictions], dict[str, ShardReader], Taxonomy]:
    config = make_config(write_lines(folder / "posts.jsonl", posts))
    manifest = build_shards(config, folder / "shards", folder / "quarantine.jsonl")
    taxonomy = Taxonomy.from_config(config.taxonomy)
    readers = {split: ShardReader([ShardFolder(str(folder / "shards"), manifest)], split) for split in manifest.splits}
    rows = {split: np.arange(len(reader)) for split, reader in readers.items()}
    return tfidf_logistic_regression(readers, rows, ["test"], taxonomy), readers, taxonomy


@pytest.mark.parametrize("validation", [60, 0])
def test_it_learns_from_known_labels_and_scores_the_posts_of_the_split(tmp_path: Path, validation: int) -> None:
    splits = {"train": 200, "test": 80} | ({"validation": validation} if validation else {})
    scored, readers, taxonomy = fit(tmp_path, make_posts(splits))
    test = scored["test"]
    texts = read_texts(readers["test"], np.arange(80), taxonomy)
    assert test.ids == sorted(texts.ids)
    labels = test.labels[:, 0]
    known = ~np.isnan(labels)
    assert roc_auc_score(labels[known] >= 0.5, test.scores[known, 0]) > 0.98
    # A policy that nobody violates cannot be learnt: all posts are alike.
    assert set(test.scores[:, 1]) == {0.5}


def test_labels_of_other_splits_do_not_leak_into_it(tmp_path: Path) -> None:
    posts = make_posts({"train": 120, "test": 40})
    scored, _, _ = fit(tmp_path / "one", posts)
    for post in posts:
        if post["split"] == "test":
            post["labels"] = {}
    again, _, _ = fit(tmp_path / "two", posts)
    np.testing.assert_array_equal(again["test"].scores, scored["test"].scores)


def test_without_any_text_every_post_scores_alike(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(picture())
    posts = make_posts({"train": 30, "test": 10})
    for post in posts:
        del post["text"]
        post["image"] = "one.png"
    scored, _, _ = fit(tmp_path, posts)
    assert set(scored["test"].scores.ravel()) == {0.5}
