"""The report: every section from what was measured, nothing loaded, nothing of what posts say; plain words that hold."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WORDS, write_posts
from evaluation_job import ALONE, add_ablation, make_config, make_run

from crossguard.configs.schema import Config, DataConfig
from crossguard.data.loading.reader import ShardReader
from crossguard.data.shards.folder import ShardFolder
from crossguard.train.evaluation.decisions import NO_LABELS
from crossguard.train.evaluation.evasion import POINT
from crossguard.train.evaluation.findings import Finding, find
from crossguard.train.evaluation.metrics import worst_groups
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.evaluation.report_errors import worst_errors
from crossguard.train.evaluation.stage import run_evaluation
from crossguard.train.export.bundle import write_bundle
from crossguard.train.export.card import model_card

SECTIONS = (
    "summary",
    "training",
    "policies",
    "languages",
    "slices",
    "curves",
    "calibration",
    "thresholds",
    "evasion",
    "lineage",
    "configuration",
)
VOID = {"meta", "link", "br", "img", "use", "path"}


class Page(HTMLParser):
    """What a browser would see: ids, attributes, text, and whether elements are closed."""

    def __init__(self, source: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.elements: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href", "action", "srcset", "poster"):
                self.addresses.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def write_suite(file: Path) -> Path:
    """Eight cases in two languages of two functions; one names none."""
    lines = []
    for number in range(8):
        meta = {"functionality": ["shouting", "negation"][number % 2], "target": "no one"} if number < 7 else {}
        post = {"id": f"case-{number}", "text": "win " * number + "!!", "language": ["de", "en"][number // 4]}
        lines.append(json.dumps({**post, "labels": {"spam": number % 2}, "split": "cases", "meta": meta}))
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def evaluated(folder: Path) -> Config:
    """A run whose report has every section."""
    config = make_config(write_posts(folder / "posts"), folder / "run")
    config.evaluation.attacks = ["swaps", "leetspeak"]
    config.evaluation.suite = str(write_suite(folder / "suite.jsonl"))
    config.evaluation.modality_subsets = True
    config.tracker.name, config.tracker.mode = "wandb", "offline"
    make_run(config)
    add_ablation(config, "text_only", ["text"])
    lines = [{"split": "train", "step": step, "loss": 1 / step, "lr": 1e-3, "grad_norm": 1.0} for step in (1, 2, 3)]
    lines.append({"split": "validation", "step": 2, "macro.auroc": 0.6, "macro.average_precision": 0.5})
    log = folder / "run" / "metrics.jsonl"
    torn = '{"split": "train", "st'
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    run_evaluation(config, ALONE)
    return config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return evaluated(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(config: Config) -> Page:
    return Page((Path(config.run_dir) / "report" / "report.html").read_text(encoding="utf-8"))


def test_the_page_is_whole_and_has_every_section(page: Page) -> None:
    assert page.open == []
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    links = {address[1:] for address in page.addresses if address.startswith("#")}
    assert links <= set(page.ids)
    for words in (
        "text only",
        "character n-grams",
        "insult",
        "Loss per known label",
        "Validation, macro",
        "spam: ROC",
        "Unwanted <advertising>.",
        "Recall, text only",
        "Disguised texts, 2 families",
    ):
        assert words in page.text


def test_the_dataset_card_counts_what_the_shards_hold(config: Config) -> None:
    run_dir = Path(config.run_dir)
    card = (run_dir / "report" / "dataset_card.md").read_text(encoding="utf-8")
    metrics = json.loads((run_dir / "report" / "metrics.json").read_text())
    cell = metrics["splits"]["test"]["policies"]["insult"]["all"]
    assert f"| test | insult | {cell['n']} | {cell['positives']} (" in card
    rows = [line.split(" | ") for line in card.splitlines() if line.startswith(("| en |", "| es |", "| ar |"))]
    assert sum(int(count.strip(" |")) for row in rows for count in row[1:4]) == 240
    assert metrics["shards"] in card


def test_the_bundles_card_says_what_disguises_cost(config: Config) -> None:
    run_dir = Path(config.run_dir)
    evasion = json.loads((run_dir / "report" / "metrics.json").read_text())["evasion"]
    rows = [line for line in model_card(config, run_dir, step=3).splitlines() if line.startswith(("| swaps", "| leet"))]
    for row, points in zip(rows, evasion["families"].values(), strict=True):
        macro = points[POINT]["macro"]
        values = [f"{rate['clean']:.3f} to {rate['attacked']:.3f}" for rate in macro.values()]
        assert row.endswith(f"| {values[0]} | {values[1]} |")


def test_a_suite_is_scored_case_by_case_and_leaves_nothing_behind(config: Config, page: Page) -> None:
    run_dir = Path(config.run_dir)
    suite = json.loads((run_dir / "report" / "metrics.json").read_text())["suite"]
    spam = suite["policies"]["spam"]
    assert (suite["name"], set(suite["policies"])) == ("suite.jsonl", {"spam"})
    assert (spam["all"]["n"], spam["all"]["violating"]) == (8, 4)
    assert {name: cell["n"] for name, cell in spam["by_functionality"].items()} == {"shouting": 4, "negation": 3}
    assert {name: cell["n"] for name, cell in spam["by_language"].items()} == {"de": 4, "en": 4}
    assert spam["by_functionality_and_language"]["negation"]["en"]["n"] == 1
    assert spam["all"]["passed"] == sum(cell["passed"] for cell in spam["by_language"].values())
    assert "Functional suite, spam" in page.text
    assert not (run_dir / ".suite").exists()
    assert not (run_dir / "predictions" / "cases.parquet").exists()


def test_the_tracker_gets_the_figures_in_the_run_that_was_trained(config: Config, page: Page) -> None:
    [files] = (Path(config.run_dir) / "wandb").glob("offline-run-*-tracked/files")
    tables = {
        file.name.partition("_")[0]: json.loads(file.read_text())
        for file in (files / "media" / "table" / "report").iterdir()
    }
    assert set(tables) == {"policies", "calibration", "thresholds"}
    rows = [dict(zip(tables["policies"]["columns"], row, strict=True)) for row in tables["policies"]["data"]]
    [spam] = [row for row in rows if (row["split"], row["policy"], row["slice"]) == ("test", "spam", "all")]
    measured = json.loads((Path(config.run_dir) / "report" / "metrics.json").read_text())
    cell = measured["splits"]["test"]["policies"]["spam"]["all"]
    assert (spam["n"], spam["auroc"]) == (cell["n"], pytest.approx(cell["auroc"]))
    assert [spam["auroc low"], spam["auroc high"]] == pytest.approx(cell["intervals"]["auroc"])
    pictures = list((files / "media" / "images" / "report").iterdir())
    assert len(pictures) == sum(tag == "svg" for tag in page.elements)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in pictures)


def test_the_page_loads_nothing_and_runs_nothing(config: Config, page: Page) -> None:
    assert [address for address in page.addresses if not address.startswith("#")] == ["data:,"]
    assert set(page.elements) & {"script", "img", "iframe", "object", "embed"} == set()
    source = (Path(config.run_dir) / "report" / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in source
    assert not re.search(r"https?://", source)
    assert not re.search(r"@import|url\((?!#)", source)


def test_the_page_holds_nothing_of_what_posts_say(page: Page) -> None:
    assert [word for word in WORDS["es"] + WORDS["ar"] if len(word) > 4 and word in page.text] == []
    assert "post/" in page.text


def test_texts_of_the_worst_errors_are_shown_where_they_are_asked_for(config: Config) -> None:
    reader = ShardReader([ShardFolder.open(config.shards_location, config.data.cache)], "test")
    row = int(reader.readable_rows(0)[0])
    raw = reader.read(row)
    predictions = Predictions(("spam",), [raw.id, "gone"], ["de", "de"], np.array([[0.9], [0.8]]), np.zeros((2, 1)))
    [hidden], [shown] = worst_errors(predictions, None), worst_errors(predictions, reader)
    assert [post["text"] for post in hidden["posts"]] == [None, None]
    assert [post["text"] for post in shown["posts"]] == [raw.text, None]
    assert raw.text


def test_no_file_but_the_shards_repeats_what_a_post_says(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    canary = "canary4711"
    posts = write_posts(tmp_path / "posts")
    lines = [json.loads(line) for line in posts.read_text(encoding="utf-8").splitlines()]
    for number, post in enumerate(lines):
        post["text"] = f"{canary} {number} {canary}"
        # A language of its own, in which no post can be told from another.
        if post["split"] == "validation":
            post |= {"split": "unseen_language", "language": "sw", "text": canary, "labels": {"spam": number % 2}}
            post.pop("image", None)
    posts.write_text("".join(json.dumps(post) + "\n" for post in lines), encoding="utf-8")
    config = make_config(posts, tmp_path / "run")
    make_run(config)
    run_evaluation(config, ALONE)
    write_bundle(config, tmp_path / "run")
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file() and "shards" not in file.parts]
    assert {"report.html", "metrics.json", "unseen_language.parquet", "card.md"} <= {file.name for file in files}
    assert [file for file in files if canary.encode() in file.read_bytes()] == []
    assert canary not in "".join(capfd.readouterr())
    # The same page owns up to what does not work.
    page = Page((tmp_path / "run" / "report" / "report.html").read_text(encoding="utf-8"))
    assert "fails in languages that training never saw: sw (split unseen_language: sw AUROC 0.500" in page.text
    assert "insufficient: too few positives or negatives" in page.text


def measured(average_precision: float, auroc: float, languages: dict[str, float]) -> dict[str, Any]:
    """A split with one policy."""
    macro = {"average_precision": average_precision, "auroc": auroc, "recall_at_precision_90": 0.1}
    cells = {
        language: {"n": 100, "positives": 40, "average_precision": 0.5, "auroc": value, "recall_at_precision_90": 0.1}
        for language, value in languages.items()
    }
    spam = {"all": {"n": 200, "positives": 80} | macro, "by_language": cells}
    split = {"policies": {"spam": spam}, "macro": macro, "macro_policy_language": macro}
    return split | {"worst": worst_groups(split["policies"])}


def said(config: Config, metrics: dict[str, Any]) -> list[Finding]:
    return find(config, metrics, {"en", "de"})


def test_the_summary_says_whether_the_reference_wins(config: Config) -> None:
    metrics = {"splits": {"test": measured(0.6, 0.8, {"en": 0.8, "de": 0.8})}}
    for reference, tone, words in [(0.7, "bad", "loses to"), (0.605, "note", "level with"), (0.5, "good", "beats")]:
        other = {"train_posts": 1200, "splits": {"test": measured(reference, 0.9, {})}}
        findings = said(config, metrics | {"references": {"tfidf_logistic_regression": other}})
        assert [finding.tone for finding in findings if f"{words} its reference" in finding.text] == [tone]


def test_the_summary_says_whether_one_modality_does_as_well(config: Config) -> None:
    metrics = {"splits": {"test": measured(0.9, 0.95, {"en": 0.9})}}
    for value, tone in [(0.5, "good"), (0.95, "bad")]:
        other = {"text_only": {"splits": {"test": measured(0.5, value, {})}}}
        findings = said(config, metrics | {"ablations": other})
        assert [finding.tone for finding in findings if f"text only {value:.3f}" in finding.text] == [tone]


def test_the_summary_says_when_an_unseen_language_fails(config: Config) -> None:
    test = measured(0.9, 0.95, {"en": 0.95, "ko": 0.9})
    findings = said(config, {"splits": {"test": test, "unseen": measured(0.3, 0.52, {"th": 0.52})}})
    texts = {finding.tone: finding.text for finding in findings if "training never saw" in finding.text}
    assert "fails in languages that training never saw: th" in texts["bad"]
    assert "ko AUROC 0.900" in texts["good"]


def test_the_summary_says_what_it_cannot_say(config: Config) -> None:
    test = measured(0.9, 0.95, {"en": 0.9, "de": 0.7})
    few = copy.deepcopy(test)
    few["policies"]["spam"]["by_language"]["de"] = {"n": 4, "positives": 1, "insufficient": True}
    assert any("1 of 2 cells" in finding.text for finding in said(config, {"splits": {"test": few}}))
    assert any(
        "spam where language is de, AUROC 0.700 beside the mean of 0.950" in finding.text
        for finding in said(config, {"splits": {"test": test}})
    )
    synthetic = replace(config, data=DataConfig(source="synthetic"))
    for recipe, warned in [(config, False), (synthetic, True)]:
        findings = said(recipe, {"splits": {"test": test}})
        assert any("nothing about the quality of moderation" in finding.text for finding in findings) is warned
    del few["macro"]
    assert said(config, {"splits": {"test": few}})[0].text.startswith("The test split has too few known")


def test_the_summary_says_where_a_promise_is_missing_or_broken(config: Config) -> None:
    test = measured(0.9, 0.95, {"en": 0.9, "de": 0.9})
    threshold = {"above": 0.5, "flagged": 30, "precision": 1.0, "recall": 0.5}
    actions = {
        "en": {"remove": threshold},
        "de": {"remove": {"above": None, "abstains": "3 labels"}},
        "fr": {"remove": {"above": None, "abstains": NO_LABELS}},
    }
    decisions = {"promises": {"remove": "precision ≥ 0.95"}, "thresholds": {"spam": actions}}
    metrics = {"splits": {"test": test}, "decisions": decisions}
    assert any("support it in 1 of 2 cells" in finding.text for finding in said(config, metrics))
    for high, broken in [(0.94, True), (0.96, False)]:
        cell = {"precision": {"value": 0.8, "interval": [0.5, high]}}
        test["actions"] = {"spam": {"remove": {"by_language": {"en": cell}}}}
        found = [one.tone for one in said(config, metrics) if "misses it on split test in spam in en" in one.text]
        assert found == (["bad"] if broken else [])
    del metrics["decisions"]
    assert any("No calibration and no thresholds" in finding.text for finding in said(config, metrics))


def test_the_summary_says_what_disguises_cost(config: Config) -> None:
    test = measured(0.9, 0.95, {"en": 0.9})
    for recall, rate, tone in [(0.46, 0.055, "good"), (0.44, 0.05, "bad"), (0.5, 0.07, "bad")]:
        families = {
            name: {
                POINT: {
                    "macro": {
                        "recall": {"clean": 0.5, "attacked": now, "difference": now - 0.5},
                        "false_positive_rate": {"clean": 0.05, "attacked": flagged, "difference": flagged - 0.05},
                    }
                }
            }
            for name, now, flagged in (("swaps", recall, 0.05), ("marks", 0.5, rate))
        }
        found = said(config, {"splits": {"test": test}, "evasion": {"families": families}})
        (finding,) = (one for one in found if one.text.startswith("Disguised texts"))
        assert finding.tone == tone
        if recall < 0.5:
            assert f"under swaps, from 50.0% to {recall:.1%}" in finding.text


def test_the_summary_says_whom_false_positives_hit(config: Config) -> None:
    for low, named in [(0.0, False), (0.02, True)]:
        test = measured(0.9, 0.95, {"en": 0.9})
        groups = {"EU": {"n": 100, "rate": 0.1, "interval": [0, 1]}, "US": {"n": 90, "rate": 0.02, "interval": [0, 1]}}
        gap = {"gap": 0.08, "interval": [low, 0.2], "highest": "EU", "lowest": "US", "groups": groups}
        test["policies"]["spam"]["false_positive_gap"] = {"threshold": 0.4, "by": {"region": gap}}
        texts = [finding.text for finding in said(config, {"splits": {"test": test}})]
        sentence = "spam flags 10.0% of them where region is EU and 2.0% where it is US"
        assert any(sentence in text for text in texts) is named
