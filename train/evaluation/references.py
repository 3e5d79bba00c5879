"""An honest reference beside the model: character n-grams and logistic regression, fitted on the same training posts.

TF-IDF over character n-grams inside word boundaries needs no tokenizer and no language: on short posts in many
languages it is a strong and cheap baseline (cf. arXiv 1607.01759). What cannot beat it is not worth its GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from crossguard.configs.progress import progress
from crossguard.data.loading.reader import SampleError, ShardReader
from crossguard.data.taxonomy import POSITIVE_FROM, Taxonomy
from crossguard.train.evaluation.predictions import Predictions

# Rows of a split are in the order of a hash of their ids, so the first of them are a fair sample.
MOST_TRAIN_POSTS = 100_000
POSTS_AT_ONCE = 20_000
MOST_FEATURES = 200_000
# Inverse strengths of the regularisation that validation chooses from, per policy.
STRENGTHS = (1.0, 4.0, 16.0)


@dataclass(frozen=True)
class Texts:
    """What the reference sees of posts, all that is written in them: a post without text has an empty one."""

    ids: list[str]
    languages: list[str]
    texts: list[str]
    # float32 [posts, policies]; NaN is unknown.
    labels: np.ndarray


def tfidf_logistic_regression(
    readers: Mapping[str, ShardReader], rows: Mapping[str, np.ndarray], splits: list[str], taxonomy: Taxonomy
) -> dict[str, Predictions]:
    """Fit on the train split (at most MOST_TRAIN_POSTS of it) and score other splits.

    Args:
        readers: a reader for train, for every split in `splits`, and for validation if there is one.
        rows: for each of these the rows that may be read.

    Returns:
        split -> predictions on the same posts that the model is scored on.
    """
    steps = 1 + len(taxonomy.names) + len(splits)
    with progress("reference", steps, "parts") as shown:
        reference = _Reference(read_texts(readers["train"], rows["train"][:MOST_TRAIN_POSTS], taxonomy))
        shown.advance(note="vocabulary")
        choose_on = None
        if "validation" in readers:
            validation = read_texts(readers["validation"], rows["validation"][:POSTS_AT_ONCE], taxonomy)
            choose_on = (reference.features(validation), validation.labels)
        for column, policy in enumerate(taxonomy.names):
            reference.fit(column, choose_on)
            shown.advance(note=policy)
        scored = {}
        for split in splits:
            parts = _parts(readers[split], rows[split], taxonomy)
            scored[split] = Predictions.gather(
                taxonomy.names, [reference.predict(taxonomy.names, part) for part in parts]
            )
            shown.advance(note=split)
    return scored


def read_texts(reader: ShardReader, rows: np.ndarray, taxonomy: Taxonomy) -> Texts:
    """Read texts and labels of these rows; a row that cannot be read is left out, as it is for the model."""
    samples = []
    for row in rows:
        try:
            samples.append(reader.read(int(row)))
        except SampleError:
            continue
    labels = [taxonomy.label_vector(sample.post["labels"]) for sample in samples]
    return Texts(
        ids=[sample.id for sample in samples],
        languages=[sample.language for sample in samples],
        texts=[sample.written for sample in samples],
        labels=np.array(labels, dtype=np.float32).reshape(len(samples), len(taxonomy.names)),
    )


class _Reference:
    """One vocabulary, one classifier a policy."""

    def __init__(self, train: Texts):
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.vectorizer = TfidfVectorizer(
            analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, max_features=MOST_FEATURES, dtype=np.float32
        )
        self.labels = train.labels
        # Without a single character there are no n-grams to learn from.
        self.train = self.vectorizer.fit_transform(train.texts) if any(map(str.strip, train.texts)) else None
        self.classifiers: dict[int, Any] = {}

    def features(self, posts: Texts) -> Any:
        """Sparse float32 [posts, features], or None when training had no text."""
        return None if self.train is None else self.vectorizer.transform(posts.texts)

    def fit(self, column: int, choose_on: tuple[Any, np.ndarray] | None) -> None:
        """Fit a policy on its known labels, taking the strength with the best average precision on validation."""
        from sklearn.linear_model import LogisticRegression

        known, positive = _known(self.labels[:, column])
        if self.train is None or len(set(positive)) < 2:
            return
        candidates = []
        for strength in STRENGTHS if choose_on is not None else STRENGTHS[1:2]:
            classifier = LogisticRegression(C=strength, solver="liblinear", tol=1e-2, random_state=0)
            classifier.fit(self.train[known], positive)
            candidates.append(classifier)
        self.classifiers[column] = candidates[0] if choose_on is None else _best(candidates, column, choose_on)

    def predict(self, policies: tuple[str, ...], posts: Texts) -> Predictions:
        """Score posts; a policy that could not be fitted scores every post alike."""
        features = self.features(posts)
        scores = np.full((len(posts.ids), len(policies)), 0.5)
        for column in range(len(policies)):
            if column in self.classifiers and len(posts.ids):
                scores[:, column] = self.classifiers[column].predict_proba(features)[:, 1]
        return Predictions(policies, posts.ids, posts.languages, scores, posts.labels)


def _best(candidates: list[Any], column: int, choose_on: tuple[Any, np.ndarray]) -> Any:
    from sklearn.metrics import average_precision_score

    features, labels = choose_on
    known, positive = _known(labels[:, column])
    if len(set(positive)) < 2:
        return candidates[len(candidates) // 2]
    return max(candidates, key=lambda one: average_precision_score(positive, one.decision_function(features[known])))


def _known(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known = np.flatnonzero(~np.isnan(labels))
    return known, labels[known] >= POSITIVE_FROM


def _parts(reader: ShardReader, rows: np.ndarray, taxonomy: Taxonomy) -> Iterator[Texts]:
    for start in range(0, len(rows), POSTS_AT_ONCE):
        yield read_texts(reader, rows[start : start + POSTS_AT_ONCE], taxonomy)
