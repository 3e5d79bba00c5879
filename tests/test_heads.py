"""Heads: several on one trunk, policies below policies, severities; from the labels to the bundle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_posts
from evaluation_job import ALONE, MODEL, make_config, make_run
from sklearn.metrics import cohen_kappa_score
from tiny_models import POSTS, batch_of, model_config

from crossguard.configs.errors import UserError
from crossguard.configs.schema import BuildConfig, Config, TaxonomyConfig
from crossguard.configs.schema.heads import HeadConfig, check_heads
from crossguard.configs.schema.loss import LossConfig
from crossguard.configs.schema.taxonomy import PolicyConfig
from crossguard.data.records import RecordError, parse_post
from crossguard.data.shards.build import build_shards
from crossguard.data.taxonomy import Taxonomy
from crossguard.train.evaluation.calibration import Calibrator
from crossguard.train.evaluation.decisions import Decisions
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.evaluation.severity import measure_severity
from crossguard.train.evaluation.stage import run_evaluation
from crossguard.train.export.bundle import load_bundle, write_bundle
from crossguard.train.export.predict import predict
from crossguard.train.models import build_model
from crossguard.train.models.heads import Heads, both
from crossguard.train.objectives.labels import LabelLoss
from crossguard.train.objectives.losses import build_loss
from crossguard.train.objectives.objective import Objective
from crossguard.train.objectives.severity import Severity
from crossguard.train.optimizer import freeze
from crossguard.train.tokenizers import ByteTokenizer

# Children before and behind their parents, three generations, levels in between.
POLICIES = [
    PolicyConfig("slur", parent="hate"),
    PolicyConfig("abuse"),
    PolicyConfig("hate", parent="abuse", severity_levels=3),
    PolicyConfig("spam", severity_levels=2),
]
TAXONOMY = Taxonomy.from_config(TaxonomyConfig("nested", "1", POLICIES))
HEADS = {"new": HeadConfig(["spam", "slur"], hidden=5), "main": HeadConfig(["hate", "abuse"])}
# Logits from where a sigmoid is 0 to where it is 1, zeros and the smallest numbers among them.
EXTREMES = torch.tensor([-1e38, -1e4, -88.0, -16.0, -1e-3, -1e-45, 0.0, 1e-45, 1e-3, 16.0, 88.0, 1e4, 1e38])


def test_a_product_of_probabilities_never_exceeds_either_of_them() -> None:
    draw = torch.Generator().manual_seed(0)
    some = torch.cat([EXTREMES, 20 * torch.randn(300, generator=draw)])
    first, second = (values.flatten().requires_grad_() for values in torch.meshgrid(some, some, indexing="ij"))
    product = both(first, second)
    assert (product <= first).all()
    assert (product <= second).all()
    exact = torch.sigmoid(first.double()) * torch.sigmoid(second.double())
    assert torch.allclose(torch.sigmoid(product.double()), exact, rtol=1e-5, atol=1e-37)
    product.clamp(-1e30, 1e30).sum().backward()
    assert torch.isfinite(first.grad).all()


def test_no_weights_put_a_child_above_its_parent_or_a_level_above_a_milder_one() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        heads = Heads(HEADS if seed % 2 else {}, TAXONOMY, width=6)
        for parameter in heads.parameters():
            torch.nn.init.normal_(parameter, std=float(torch.logspace(-3, 3, 20)[seed]))
        logits = heads(10 * torch.randn(50, 6))
        assert logits.shape == (50, TAXONOMY.num_labels) == (50, 9)
        slur, abuse, hate = logits[:, 0], logits[:, 1], logits[:, 2]
        assert (slur <= hate).all()
        assert (hate <= abuse).all()
        for levels in TAXONOMY.severities.values():
            assert (logits[:, levels].diff(dim=1) <= 0).all()
    assert TAXONOMY.columns[4:] == ("hate >= 1", "hate >= 2", "hate >= 3", "spam >= 1", "spam >= 2")


def test_columns_stand_where_the_label_vector_has_them_however_heads_share_them() -> None:
    """Equal weights say the same in one head as in two."""
    torch.manual_seed(0)
    one = Heads({}, TAXONOMY, width=6)
    apart = Heads({"new": HeadConfig(["spam", "slur"]), "main": HeadConfig(["hate", "abuse"])}, TAXONOMY, width=6)
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter)
    whole: Any = one["main"]
    for name, rows, scores, gaps in (("new", [0, 3], [1], [2]), ("main", [1, 2], [0], [0, 1])):
        part: Any = apart[name]
        for key in ("weight", "bias"):
            getattr(part.logits, key).data = getattr(whole.logits, key).data[rows]
            getattr(part.severity.score, key).data = getattr(whole.severity.score, key).data[scores]
        part.severity.gaps.data = whole.severity.gaps.data[gaps]
    features = torch.randn(9, 6)
    assert torch.allclose(one(features), apart(features), atol=1e-6)


def test_a_new_policy_is_trained_in_a_head_of_its_own_and_no_old_score_changes_a_bit() -> None:
    old = Taxonomy.from_config(TaxonomyConfig("t", "1", [PolicyConfig("spam"), PolicyConfig("insult")]))
    new = Taxonomy.from_config(TaxonomyConfig("t", "2", [*map(PolicyConfig, ("spam", "threat", "insult"))]))
    before = build_model(model_config(), old, ByteTokenizer(), 0).eval()
    torch.nn.init.normal_(before.heads["main"].logits.weight)
    heads = {"main": HeadConfig(["spam", "insult"]), "threats": HeadConfig(["threat"], hidden=4)}
    after = build_model(replace(model_config(), heads=heads), new, ByteTokenizer(), 1)
    missing, unexpected = after.load_state_dict(before.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("heads.threats.") for name in missing)
    freeze(after, ["text.*", "image.*", "fusion.*", "heads.main.*"])
    optimizer = torch.optim.AdamW([one for one in after.parameters() if one.requires_grad], lr=0.1)
    batch = batch_of(*POSTS)
    first = after(batch).detach()
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.softplus(after(batch)).sum().backward()
        optimizer.step()
    with torch.no_grad():
        scores, expected = after.eval()(batch), before(batch)
    assert torch.equal(scores[:, [0, 2]], expected)
    assert (scores[:, 1] - first[:, 1]).abs().min() > 0.1


@pytest.mark.parametrize(
    ("labels", "severity", "implied"),
    [
        ({"slur": 1}, {}, {"slur": 1, "hate": 1, "abuse": 1}),
        ({"abuse": 0}, {}, {"abuse": 0, "hate": 0, "slur": 0}),
        ({"hate": 0, "abuse": 1}, {}, {"hate": 0, "abuse": 1, "slur": 0}),
        ({"slur": 0.7}, {}, {"slur": 0.7}),
        ({"slur": 0.7, "hate": 0.6}, {}, {"slur": 0.7, "hate": 0.6}),
        ({"slur": 0, "abuse": 1}, {}, {"slur": 0, "abuse": 1}),
        ({}, {"hate": 2}, {"hate": 1, "abuse": 1}),
        ({}, {"hate": 0}, {"hate": 0, "slur": 0}),
        # Not a policy with levels: as free as ever.
        ({"abuse": 0}, {"abuse": 9}, {"abuse": 0, "hate": 0, "slur": 0}),
    ],
)
def test_labels_imply_others(labels: dict[str, float], severity: dict[str, int], implied: dict[str, float]) -> None:
    post = parse_post({"id": "p", "text": "t", "labels": labels, "severity": severity}, TAXONOMY)
    assert post.labels == implied


@pytest.mark.parametrize(
    ("labels", "severity", "field"),
    [
        ({"slur": 1, "hate": 0}, {}, "labels.slur"),
        ({"slur": 1, "abuse": 0}, {}, "labels.hate"),
        ({"hate": 0.6, "abuse": 0.4}, {}, "labels.hate"),
        ({"hate": 0}, {"hate": 1}, "severity.hate"),
        ({"hate": 1}, {"hate": 0}, "severity.hate"),
        ({}, {"hate": 4}, "severity.hate"),
        ({"abuse": 0}, {"hate": 3}, "labels.hate"),
    ],
)
def test_contradictions_are_errors_of_the_post(labels: dict[str, float], severity: dict[str, int], field: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse_post({"id": "p", "text": "t", "labels": labels, "severity": severity}, TAXONOMY)
    assert [name for name, _ in caught.value.errors] == [field]


def test_a_contradiction_names_file_line_and_field(tmp_path: Path) -> None:
    lines = [{"id": "a", "text": "t", "labels": {}}, {"id": "b", "text": "t", "labels": {"slur": 1, "hate": 0}}]
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = make_config(tmp_path / "posts.jsonl", tmp_path / "run", taxonomy=TaxonomyConfig("n", "1", POLICIES))
    with pytest.raises(UserError, match=r"posts\.jsonl:2: labels\.slur: is 1, and labels\.hate is 0, of which it"):
        build_shards(config, tmp_path / "shards", tmp_path / "quarantine.jsonl")


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ([PolicyConfig("a", parent="b")], r"taxonomy\.policies\.a\.parent=b"),
        ([PolicyConfig("a", parent="a")], r"a\.parent: a < a is a circle"),
        ([PolicyConfig("a", parent="b"), PolicyConfig("b", parent="a")], r"a\.parent: a < b < a is a circle"),
    ],
)
def test_parents_are_policies_in_no_circle(policies: list[PolicyConfig], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TaxonomyConfig("t", "1", policies)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({"main": HeadConfig(["a"])}, r"model\.heads: no head has b"),
        ({"main": HeadConfig(["a", "b"]), "more": HeadConfig(["b"])}, r"more\.policies: 'b' is in head 'main' already"),
        ({"main": HeadConfig(["a", "bb"])}, r"model\.heads\.main\.policies=bb: did you mean 'b'"),
        ({"main": HeadConfig([])}, r"model\.heads\.main\.policies: empty"),
        ({"Main": HeadConfig(["a", "b"])}, r"model\.heads: name 'Main'"),
    ],
)
def test_every_policy_has_one_head(heads: dict[str, HeadConfig], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_heads(heads, ["a", "b"])


def test_unknown_levels_have_no_loss_and_known_ones_weigh_as_much_as_a_label() -> None:
    severe = TAXONOMY.level_vector({"hate": 1.0}, {"hate": 2})
    assert np.array_equal(severe, np.array([1, 1, 0, np.nan, np.nan], np.float32), equal_nan=True)
    benign = TAXONOMY.level_vector({"spam": 0.0}, {})
    assert np.array_equal(benign, np.array([np.nan, np.nan, np.nan, 0, 0], np.float32), equal_nan=True)
    labels = torch.tensor(np.array([[np.nan, 1, 1, np.nan, *severe], [np.nan] * 3 + [0, *benign]], np.float32))
    logits = torch.full((2, 9), 2.0).masked_fill(labels.isnan(), float("inf")).requires_grad_()
    batch = replace(batch_of(*POSTS[:2]), labels=labels)
    policies, severity = LabelLoss(build_loss(LossConfig()), 4), Severity(TAXONOMY, 0.5)
    assert list(policies.counts(batch)) == list(severity.counts(batch)) == [3]
    hit, miss = np.log1p(np.exp(-2)), np.log1p(np.exp(2))
    [levels] = severity.sums({"logits": logits}, batch)
    assert levels.item() == pytest.approx(hit / 3 + hit / 3 + miss / 3 + 2 * miss / 2)
    of_step = Objective(policies, [severity]).of_step([3, 3], torch.device("cpu"))
    loss, means, elements = of_step(lambda _: logits, batch)
    assert elements.shape == (2, 4)
    assert loss.item() == pytest.approx((elements.sum().item() + 0.5 * levels.item()) / 3)
    assert set(of_step.numbers(means.tolist())) == {"loss", "loss.severity", "loss.total"}
    loss.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad == 0, labels.isnan())


def test_kappa_is_scikit_learn_s_and_its_interval_holds_it() -> None:
    draw = np.random.default_rng(0)
    given = draw.integers(0, 4, 400).astype(float)
    expected = np.clip(given + draw.normal(0, 0.8, 400), 0, 3)
    given[::5] = np.nan
    ids, languages = [str(number) for number in range(400)], ["de", "en"] * 200
    nothing = np.zeros((400, 0))
    posts = Predictions((), ids, languages, nothing, nothing, severity={"hate": np.stack([expected, given], 1)})
    found = measure_severity(posts, "hate", min_positives=10)
    known = ~np.isnan(given)
    kappa = cohen_kappa_score(given[known], np.rint(expected[known]), weights="quadratic")
    cell = found["all"]
    assert (cell["n"], cell["quadratic_kappa"]) == (320, pytest.approx(kappa))
    for name in ("quadratic_kappa", "mean_absolute_error"):
        low, high = cell["intervals"][name]
        assert low < cell[name] < high < low + 0.2
    assert set(found["by_language"]) == {"de", "en"}
    assert "insufficient" in measure_severity(posts, "hate", min_positives=300)["all"]


def test_calibration_leaves_a_child_below_its_parent() -> None:
    scores = np.array([[0.3, 0.4, 0.35], [0.8, 0.9, 0.85]])
    posts = Predictions(("slur", "abuse", "hate"), ["a", "b"], ["de", "de"], scores, np.full((2, 3), np.nan))
    raised = {"slur": Calibrator("platt", (1.0, 3.0))}
    free = Decisions(raised, {}, {}).calibrated(posts)
    assert (free[:, 0] > free[:, 2]).all()
    held = Decisions(raised, {}, {}, [("hate", "abuse"), ("slur", "hate")])
    assert Decisions.from_json(json.loads(json.dumps(held.to_json()))) == held
    assert held.calibrated(posts)[:, 0].tolist() == scores[:, 2].tolist()


def nested_posts(folder: Path) -> Path:
    """Posts whose spam may be a scam, which has two levels; half of the labels and levels unknown."""
    file = write_posts(folder, count=150)
    posts = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for number, post in enumerate(posts):
        spam = post["labels"]["spam"]
        post["labels"] = {"spam": spam} | ({"scam": spam * (number % 2)} if number % 3 else {})
        if post["labels"].get("scam") == 1 and number % 4:
            post["severity"] = {"scam": 1 + number // 2 % 2}
    file.write_text("".join(json.dumps(post) + "\n" for post in posts), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with a child, a severity and two heads, evaluated with every subset of modalities, and exported."""
    folder = tmp_path_factory.mktemp("heads")
    policies = [PolicyConfig("scam", parent="spam", severity_levels=2), PolicyConfig("spam")]
    heads = {"main": HeadConfig(["spam"]), "scams": HeadConfig(["scam"], hidden=4)}
    config = make_config(
        nested_posts(folder / "posts"),
        folder / "run",
        taxonomy=TaxonomyConfig("nested", "1", policies),
        model=replace(MODEL, heads=heads),
        build=BuildConfig(num_workers=1),
        ablations={},
    )
    config.evaluation = replace(config.evaluation, references=[], modality_subsets=True, min_positives=2)
    make_run(config)
    run_evaluation(config, ALONE)
    write_bundle(config, folder / "run")
    return config


def test_from_the_evaluation_to_the_bundle(config: Config) -> None:
    run_dir = Path(config.run_dir)
    measured = Predictions.read(run_dir / "predictions" / "test.parquet")
    assert (measured.scores[:, 0] <= measured.scores[:, 1]).all()
    expected, given = measured.severity["scam"].T
    assert expected.min() >= 0
    assert expected.max() <= 2
    assert len(set(expected)) > 10
    assert set(given[~np.isnan(given)]) == {0, 1, 2}
    # Unknown where neither a level nor "benign" is known.
    assert (np.isnan(given) >= np.isnan(measured.labels[:, 0])).all()
    assert predict(run_dir / "bundle", config.data, run_dir / "all.parquet", 16)
    predicted = Predictions.read(run_dir / "all.parquet")
    rows = [predicted.ids.index(post) for post in measured.ids]
    assert np.abs(predicted.scores[rows] - measured.scores).max() < 1e-6
    assert np.abs(predicted.severity["scam"][rows, 0] - expected).max() < 1e-6
    bundle = load_bundle(run_dir / "bundle")
    assert bundle.taxonomy == Taxonomy.from_config(config.taxonomy)
    calibrated = bundle.decisions.calibrated(predicted)
    assert (calibrated[:, 0] <= calibrated[:, 1]).all()


def test_every_subset_of_modalities_and_the_severity_are_shown(config: Config) -> None:
    report = Path(config.run_dir) / "report"
    metrics = json.loads((report / "metrics.json").read_text())
    subsets = metrics["modality_subsets"]["subsets"]
    assert [row["modalities"] for row in subsets] == [["text"], ["image"], ["text", "image"]]
    whole = metrics["splits"]["test"]
    assert subsets[-1]["macro"] == whole["macro"]
    assert len({row["macro"]["auroc"] for row in subsets}) == 3
    cell = whole["policies"]["scam"]["severity"]["all"]
    page, card = (report / "report.html").read_text(), (report.parent / "bundle" / "card.md").read_text()
    assert "With modalities withheld" in page
    assert f"{cell['quadratic_kappa']:.3f}" in page
    assert f"quadratic weighted kappa {cell['quadratic_kappa']:.3f}" in card
    assert f"| image | {subsets[1]['macro']['auroc']:.3f} |" in card
