"""Evasion as it is measured: each post beside its own disguise, at thresholds that were found without any."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from crossguard.configs.errors import UserError
from crossguard.configs.schema import EvaluationConfig
from crossguard.data.curation.attacks import FAMILIES, attack
from crossguard.data.loading.sample import RawSample
from crossguard.train.evaluation.decisions import Decisions
from crossguard.train.evaluation.disguise import Disguise
from crossguard.train.evaluation.evasion import POINT, measure_evasion
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.evaluation.thresholds import Threshold

CONFIG = EvaluationConfig(min_positives=10)
POSTS = 400


def test_a_disguise_depends_on_seed_family_and_id_alone() -> None:
    said = "people should never listen to nobody tomorrow " * 3
    written = {"ocr": said, "transcript": said, "comments": [said, said]}
    raw = RawSample({"id": "p", "labels": {}}, text=said, images=[b"picture"], texts=written)
    for family in FAMILIES:
        disguised = Disguise(family, 3)(raw)
        assert disguised == Disguise(family, 3)(raw)
        assert replace(disguised, text=said, texts=written) == raw
        assert disguised.text == attack(said, family, f"3/{family}/p/")
        assert disguised.texts["transcript"] == said
        changed = {disguised.text, disguised.texts["ocr"], *disguised.texts["comments"]}
        assert len(changed - {said}) == 4
    other = replace(raw, post={"id": "q", "labels": {}})
    texts = {Disguise("swaps", seed)(one).text for seed in (3, 4) for one in (raw, other)}
    assert len(texts) == 4
    assert Disguise("swaps", 3)(replace(raw, text=None)).text is None
    with pytest.raises(UserError, match=r"evaluation\.attacks.*did you mean 'swaps'"):
        EvaluationConfig(attacks=["swap"])


def posts(scores: np.ndarray, labels: np.ndarray, languages: list[str] | None = None) -> Predictions:
    """Predictions of one or two policies."""
    names = ("spam", "insult")[: scores.shape[1]]
    ids = [f"p{number:03}" for number in range(len(scores))]
    return Predictions(names, ids, languages or ["en"] * len(ids), scores, labels.astype(np.float32))


def even(*first: float) -> np.ndarray:
    """Scores of `first`, in columns, for half of the posts and .2 for the others."""
    return np.array([list(first)] * (POSTS // 2) + [[0.2] * len(first)] * (POSTS // 2))


def test_recall_and_false_positives_are_those_of_the_thresholds_of_validation() -> None:
    draw = np.random.default_rng(0)
    labels = np.repeat([1.0, 0.0], POSTS // 2)[:, None]
    benign = np.linspace(0, 0.5, POSTS // 2)
    validation = posts(np.concatenate([np.full(POSTS // 2, 0.9), benign])[:, None], labels)
    clean = posts(even(0.9), labels)
    # 40 of 200 violating posts fall below the threshold of about .475, 10 of 200 benign ones rise above it.
    after = clean.scores.copy()
    after[draw.permutation(POSTS // 2)[:40]] = 0.4
    after[POSTS // 2 + draw.permutation(POSTS // 2)[:10]] = 0.6
    # In another order, as other batches would give them.
    shuffled = posts(after, labels).take(draw.permutation(POSTS))
    found = measure_evasion({"validation": validation, "test": clean}, "test", {"swaps": shuffled}, None, CONFIG)
    assert (found["split"], found["fitted_on"]) == ("test", "validation")
    point = found["families"]["swaps"][POINT]
    cell = point["policies"]["spam"]["all"]
    assert point["macro"] == {name: cell[name] for name in ("recall", "false_positive_rate")}
    assert point["policies"]["spam"]["by_language"]["en"] == cell
    recall, rate = cell["recall"], cell["false_positive_rate"]
    assert (recall["clean"], recall["attacked"], rate["clean"], rate["attacked"]) == (1.0, 0.8, 0.0, 0.05)
    for change, error in ((recall, np.sqrt(0.2 * 0.8 / 200)), (rate, np.sqrt(0.05 * 0.95 / 200))):
        low, high = change["interval"]
        assert low < change["difference"] < high
        assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.15)


def test_intervals_are_paired_and_policies_are_drawn_together() -> None:
    labels = np.repeat([1.0, 0.0], POSTS // 2)[:, None] * np.ones((1, 2))
    hard = np.arange(POSTS) % 2 == 0
    scores = np.where(labels == 1, np.where(hard[:, None], 0.1, 0.9), 0.2)
    clean, same = posts(scores, labels), posts(scores, labels)
    # What chance decides of a post it decides before and after: no change has no spread.
    macro = measure_evasion({"test": clean}, "test", {"swaps": same}, None, CONFIG)["families"]["swaps"][POINT]["macro"]
    assert macro["recall"] == {"clean": 0.5, "attacked": 0.5, "difference": 0.0, "interval": [0.0, 0.0]}
    # The same posts are hit in both policies: their mean is no surer than one of them.
    hit = np.where((np.arange(POSTS) % 10 == 1)[:, None], 0.0, scores)
    found = measure_evasion({"test": clean}, "test", {"swaps": posts(hit, labels)}, None, CONFIG)
    point = found["families"]["swaps"][POINT]
    assert point["macro"]["recall"] == point["policies"]["spam"]["all"]["recall"]
    assert point["macro"]["recall"]["difference"] == pytest.approx(-0.1)
    assert found["fitted_on"] == "test"


def test_unknown_labels_and_languages_without_a_threshold_do_not_count() -> None:
    labels = np.repeat([1.0, 0.0], POSTS // 2)[:, None] * np.ones((1, 2))
    labels[::4, 0] = np.nan
    labels[8:-8, 1] = np.nan  # Too few are left.
    languages = ["de", "en"] * (POSTS // 2)
    clean, after = posts(even(0.9, 0.9), labels, languages), posts(even(0.1, 0.1), labels, languages)
    thresholds = {"spam": {"de": {"remove": Threshold(0.5)}, "en": {"remove": Threshold(None, "few")}}}
    decisions = Decisions({}, thresholds, {"remove": "precision"})
    families = measure_evasion({"test": clean}, "test", {"swaps": after}, decisions, CONFIG)["families"]
    everywhere, removed = families["swaps"][POINT]["policies"], families["swaps"]["remove"]["policies"]
    assert everywhere["spam"]["all"]["n"] == POSTS * 3 // 4
    assert everywhere["insult"]["all"] == {"n": 16, "positives": 8, "insufficient": True}
    assert set(removed) == {"spam"}
    assert set(removed["spam"]["by_language"]) == {"de"}
    assert removed["spam"]["all"]["n"] == POSTS // 4
    assert families["swaps"]["remove"]["macro"]["recall"]["attacked"] == 0.0
