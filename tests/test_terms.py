"""What is minimised beside the plain loss: weights, priors and every term, on any ranks, over resumes, and what is wrong."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from build_job import build, make_config, make_posts, write_lines
from rank_models import alone, run_ranks
from rank_objectives import SHARD
from rank_training import arguments, write_job
from tiny_models import TAXONOMY, batch_of, model_config, post

from crossguard.configs.compose import compose
from crossguard.configs.errors import UserError
from crossguard.configs.schema.loss import (
    AlignmentConfig,
    BalanceConfig,
    DistillConfig,
    GroupDroConfig,
    LogitAdjustmentConfig,
    LossConfig,
)
from crossguard.data.curation.attacks import TextAttacks
from crossguard.data.loading.sample import RawSample
from crossguard.data.shards.build import build_shards
from crossguard.data.shards.labels import LabelCounts
from crossguard.train.encode import PostEncoder
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.objectives.balance import label_weights, log_odds
from crossguard.train.objectives.distillation import Teacher
from crossguard.train.objectives.group_dro import GroupDro
from crossguard.train.objectives.translations import PairFile, Translations
from crossguard.train.training import run_training

HERE = Path(__file__).parent
COUNTS = LabelCounts.of_shards([SHARD], TAXONOMY.names)
# Benign and violating labels of spam and insult, by language.
TABLE = np.array([[[40, 45], [20, 5]], [[7.5, 0], [1.5, 0]], [[0, 3], [0, 1]]])


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_stages_and_micro_batches_equal_one_batch(tmp_path: Path, ranks: int) -> None:
    """Five pairs, which two ranks do not divide, and posts without text, label or teacher are among them."""
    run_ranks(ranks, HERE / "rank_objectives.py", str(tmp_path), str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["apart"]) == 8
    for name, case in found["apart"].items():
        assert case["numbers"] < 1e-6, (name, case)
        assert case["weights"] < 1e-6, (name, case)
    for line in found["told"]:
        assert all(value > 1e-3 for value in line.values()), line


def test_the_manifest_counts_labels_by_language_and_policy(tmp_path: Path) -> None:
    posts = make_posts(60)
    manifest = build(make_config(write_lines(tmp_path / "p.jsonl", posts)), tmp_path / "run")
    train = [one for one in posts if one.get("split") == "train"]
    counts = LabelCounts.of_shards(manifest.shards_of("train"), ("hate", "spam"))
    assert counts.languages == ("de", "und")
    for row, language in enumerate(counts.languages):
        for column, policy in enumerate(counts.policies):
            labels = [one["labels"][policy] for one in train if one.get("language", "und") == language]
            known = [label for label in labels if label is not None]
            assert counts.known[row, column] == len(known)
            assert counts.violating[row, column] == pytest.approx(sum(known), abs=1e-5)
    assert counts.known.sum() < 2 * len(train)  # Unknown ones do not count.


@pytest.mark.parametrize("by", [["class"], ["language"], ["language", "class"]])
@pytest.mark.parametrize("beta", [None, 0.9])
def test_weights_of_labels_have_mean_one_and_even_out(by: list[str], beta: float | None) -> None:
    weights = label_weights(BalanceConfig(by=by, exponent=1.0, beta=beta), COUNTS)
    assert (weights * TABLE).sum() / TABLE.sum() == pytest.approx(1, rel=1e-6)
    if by == ["class"] and beta is None:
        np.testing.assert_allclose((weights * TABLE).sum(0), TABLE.sum() / 4, rtol=1e-5)
    if by == ["language"] and beta is None:
        np.testing.assert_allclose((weights * TABLE).sum((1, 2)), TABLE.sum() / 3, rtol=1e-5)
    if by == ["class"] and beta is not None:
        sizes = (1 - 0.9 ** TABLE.sum(0)) / 0.1
        np.testing.assert_allclose(weights[0] * sizes, (weights[0] * sizes)[0, 0], rtol=1e-5)


def test_a_smaller_exponent_weighs_less() -> None:
    spread = [
        np.ptp(label_weights(BalanceConfig(by=["language"], exponent=exponent), COUNTS)) for exponent in (0, 0.5, 1)
    ]
    assert spread[0] == 0 < spread[1] < spread[2]


def test_priors_of_policies_and_of_their_languages() -> None:
    odds = log_odds(LogitAdjustmentConfig(tau=2.0), COUNTS)
    np.testing.assert_allclose(odds, np.log([[22 / 48, 6.5 / 48.5]] * 3) * 2, rtol=1e-5)
    by_language = log_odds(LogitAdjustmentConfig(tau=1.0, by_language=True), COUNTS)
    rate = (20 + 10 * 22 / 70) / 70
    assert by_language[0, 0] == pytest.approx(math.log(rate / (1 - rate)), rel=1e-5)
    assert by_language[2, 0] == pytest.approx(odds[0, 0] / 2, rel=1e-5)  # Nobody labeled it there.


def test_weights_of_languages_follow_their_losses() -> None:
    weights: dict[str, float] = {}
    dro = GroupDro(GroupDroConfig(step_size=0.5), {"a": 100, "b": 100, "c": 4}, weights)
    assert weights == dict.fromkeys("abc", 1 / 3)
    dro.follow({"a": 1.0, "b": 2.0})
    assert weights["b"] / weights["a"] == pytest.approx(math.exp(0.5))
    assert weights["a"] / weights["c"] == pytest.approx(math.exp(0.5))
    assert dro.shares(["a", "b"]) == pytest.approx({"a": 1 / (1 + math.exp(0.5)), "b": 1 - 1 / (1 + math.exp(0.5))})
    assert dro.shares([]) == {}
    before = dict(weights)
    GroupDro(GroupDroConfig(step_size=0.5), {"a": 100, "b": 100, "c": 4}, weights)
    assert weights == before  # Not a bit, after a resume.
    GroupDro(GroupDroConfig(step_size=0.5), {"a": 100, "d": 7}, weights)
    assert weights["d"] == pytest.approx(0.5 / (0.5 + before["a"]))
    dro = GroupDro(GroupDroConfig(step_size=1.0, adjustment=3.0), {"a": 100, "b": 9}, weights := {})
    dro.follow({"a": 1.0, "b": 1.0})
    assert weights["b"] / weights["a"] == pytest.approx(math.exp(3 / 3 - 3 / 10))
    for _ in range(50):
        dro.follow({"a": 1e4, "b": 0.0})
    assert weights["b"] == 1e-9
    assert weights["a"] == pytest.approx(1)


def test_the_teacher_is_matched_by_id_and_fills_in_only_where_asked(tmp_path: Path) -> None:
    batch = replace(batch_of(post(1, 3, 0), post(2, 3, 0)), labels=torch.tensor([[1.0, math.nan], [math.nan, 0.0]]))
    file = tmp_path / "teacher.parquet"
    unlabeled = np.full((1, 2), np.nan, np.float32)
    Predictions(("insult", "spam"), ["post-1"], ["de"], np.array([[0.25, 0.75]]), unlabeled).write(file)
    attached = Teacher(DistillConfig(str(file)), TAXONOMY.names).attach(batch)
    assert attached.teacher is not None
    assert attached.teacher[0].tolist() == [0.75, 0.25]
    assert attached.teacher[1].isnan().all()
    torch.testing.assert_close(attached.labels, batch.labels, equal_nan=True)
    filled = Teacher(DistillConfig(str(file), fill_unknown=True), TAXONOMY.names).attach(batch).labels
    torch.testing.assert_close(filled, torch.tensor([[1.0, 0.25], [math.nan, 0.0]]), equal_nan=True)
    with pytest.raises(UserError, match=r"predictions=.*: scores insult, spam, the taxonomy has spam, hate; predict"):
        Teacher(DistillConfig(str(file)), ("spam", "hate"))


def pair_file(folder: Path, lines: list[Any], size: int = 2) -> PairFile:
    file = folder / "pairs.jsonl"
    file.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return PairFile.open(AlignmentConfig(str(file), batch_size=size))


def test_pairs_of_a_step_are_a_function_of_seed_and_step(tmp_path: Path) -> None:
    lines = [{"id": f"{row}", "a": f"für {row}", "b": f"for {row}", "language_b": "en"} for row in range(10)]
    file = pair_file(tmp_path, lines, 4)
    encode = PostEncoder(model_config(), TAXONOMY)
    pairs, again = (Translations(file, 4, 3, encode) for _ in range(2))
    steps = [again.of_step(step).tolist() for step in (4, 3, 2, 1)][::-1]
    assert steps == [pairs.of_step(step).tolist() for step in range(1, 5)]
    assert len({*steps[0], *steps[1]}) == len({*steps[2], *steps[3]}) == 8
    assert steps[:2] != steps[2:]
    assert steps != [Translations(file, 4, 4, encode).of_step(step).tolist() for step in range(1, 5)]
    assert file.texts(np.array([7, 2])) == ["für 7", "für 2", "for 7", "for 2"]
    batch = pairs.attach(batch_of(post(1, 3, 0)), 2, alone())
    assert batch.pair_ids is not None
    assert batch.pair_mask is not None
    expected = [encode.tokens(text) for text in file.texts(np.array(steps[1]))]
    for ids, mask, tokens in zip(batch.pair_ids, batch.pair_mask, expected, strict=True):
        assert ids[mask].tolist() == tokens.tolist()


def test_wrong_lines_are_named_and_not_shown(tmp_path: Path) -> None:
    good = {"id": "1", "a": "x", "b": "y"}
    with pytest.raises(UserError) as error:
        pair_file(tmp_path, [good, "secret {\n", {"id": "2", "a": "secret"}, "[]\n", good])
    path = tmp_path / "pairs.jsonl"
    assert str(error.value).splitlines() == [
        f"{path}:2: not valid JSON",
        f"{path}:3: b: missing, or not a text",
        f"{path}:4: not an object",
    ]
    with pytest.raises(UserError, match=r"1 pairs, and a step takes 2; lower train\.alignment\.batch_size"):
        pair_file(tmp_path, [good])
    with pytest.raises(UserError, match=r"train\.alignment\.pairs=nowhere: cannot be read"):
        PairFile.open(AlignmentConfig("nowhere"))


def test_the_second_view_is_a_disguise_by_position() -> None:
    config = model_config()
    disguises = TextAttacks(1.0, ("repetition",), "7/second")
    encode = PostEncoder(config, TAXONOMY, disguises=disguises)
    raw = RawSample({"id": "p", "labels": {}}, "a rather long sentence to be disguised")
    plain = PostEncoder(config, TAXONOMY)(raw, 5)
    one, other, same = (encode(raw, position) for position in (5, 6, 5))
    assert plain.disguised is None
    assert one.input_ids is not None
    assert one.input_ids.tolist() == plain.input_ids.tolist()  # type: ignore[union-attr]
    assert one.disguised is not None
    assert one.disguised.tolist() == encode.tokens(disguises.apply(raw.text or "", 5)).tolist()  # type: ignore[union-attr]
    assert one.disguised.tolist() == same.disguised.tolist()  # type: ignore[union-attr]
    assert len({tuple(one.disguised), tuple(one.input_ids), tuple(other.disguised)}) == 3  # type: ignore[arg-type]
    assert encode(RawSample({"id": "p", "labels": {}}), 5).disguised.tolist() == []  # type: ignore[union-attr]
    assert encode(raw).disguised is None  # Outside training.


ALL_TERMS = [
    "train.loss.group_dro.step_size=0.1",
    "train.loss.balance.by=[class]",
    "train.loss.logit_adjustment.tau=1",
    "train.consistency.weight=1",
    "train.alignment.batch_size=3",
]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of posts in two languages, a teacher of some of them, pairs; a run of 8 steps, and one of 4 and 4."""
    folder = tmp_path_factory.mktemp("terms")
    write_job(folder)
    posts = [json.loads(line) for line in (folder / "posts.jsonl").read_text().splitlines()]
    for number, one in enumerate(posts):
        one["language"] = ("de", "sw", "de")[number % 3]
    write_lines(folder / "posts.jsonl", posts)
    build_shards(compose(arguments(folder, "build")), folder / "shards", folder / "quarantine.jsonl")
    known = [one["id"] for one in posts[:70]]
    scores = np.random.default_rng(0).random((70, 2))
    teacher = Predictions(("spam", "insult"), known, ["de"] * 70, scores, np.full((70, 2), np.nan, np.float32))
    teacher.write(folder / "teacher.parquet")
    write_lines(folder / "pairs.jsonl", [{"id": f"{row}", "a": f"abc {row}", "b": f"def {row}"} for row in range(9)])
    jobs = [
        line_of(folder, "whole", "train.max_steps=8"),
        line_of(folder, "resumed", "train.max_steps=4", "train.schedule_steps=8"),
        line_of(folder, "resumed", "train.max_steps=8", "train.schedule_steps=8"),
    ]
    run_ranks(2, HERE / "rank_training.py", json.dumps(jobs))
    return folder


def line_of(folder: Path, run_dir: str, *more: str) -> list[str]:
    files = [
        f"train.distill.predictions={folder / 'teacher.parquet'}",
        f"train.alignment.pairs={folder / 'pairs.jsonl'}",
    ]
    return arguments(folder, run_dir, *ALL_TERMS, *files, *more)


def lines_of(run_dir: Path) -> list[dict[str, float]]:
    """What each step says of its loss."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    about = ("step", "loss", "group_weight", "grad_norm")
    return [{name: value for name, value in line.items() if name.startswith(about)} for line in lines]


def test_a_resumed_run_equals_one_that_never_stopped(job: Path) -> None:
    whole = lines_of(job / "whole")
    assert lines_of(job / "resumed") == whole
    terms = ("loss", "loss.robust", "loss.distill", "loss.consistency", "loss.alignment", "loss.total")
    for line in whole:
        assert line.keys() == {"step", "grad_norm", *terms, "group_weight.de", "group_weight.sw"}
        assert all(value > 0 for value in line.values())
        total = sum(line[name] for name in terms[1:4]) + 0.1 * line["loss.alignment"]
        assert line["loss.total"] == pytest.approx(total, rel=1e-6)
    assert whole[0]["group_weight.de"] == 0.5 != whole[7]["group_weight.de"]


def test_another_file_of_the_same_name_is_refused(job: Path) -> None:
    more = "train.max_steps=9"
    with pytest.raises(UserError, match=r"train\.alignment\.pairs: not the file that the checkpoint was trained with"):
        run_training(compose([*line_of(job, "whole", more), "train.alignment.pairs=null"]), alone())
    (job / "others.jsonl").write_text((job / "pairs.jsonl").read_text().replace("abc", "xyz"))
    with pytest.raises(UserError, match=r"train\.alignment\.pairs: not the file that the checkpoint was trained with"):
        run_training(compose([*line_of(job, "whole", more), f"train.alignment.pairs={job / 'others.jsonl'}"]), alone())
    with pytest.raises(UserError, match=r"train\.distill\.weight: was 1\.0, is now 0\.5"):
        run_training(compose([*line_of(job, "whole", more), "train.distill.weight=0.5"]), alone())
    (job / "moved.jsonl").write_text((job / "pairs.jsonl").read_text())
    moved = [*line_of(job, "whole", more), f"train.alignment.pairs={job / 'moved.jsonl'}"]
    run_training(compose(moved), alone())  # One rank, and the file elsewhere.
    assert [line["step"] for line in lines_of(job / "whole")] == [*range(1, 10)]


def test_a_teacher_of_other_posts_is_refused(job: Path) -> None:
    teacher = Predictions.read(job / "teacher.parquet")
    replace(teacher, ids=[f"other-{post}" for post in teacher.ids]).write(job / "stranger.parquet")
    line = [*line_of(job, "stranger"), f"train.distill.predictions={job / 'stranger.parquet'}"]
    with pytest.raises(UserError, match=r"stranger\.parquet: has the score of none of the 110 training posts"):
        run_training(compose(line), alone())


def test_what_cannot_go_together_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.loss\.group_dro: weighs the languages, as .*; choose one"):
        LossConfig(group_dro=GroupDroConfig(step_size=0.1), balance=BalanceConfig(by=["language"]))
    with pytest.raises(UserError, match=r"train\.distill\.predictions: nothing uses it"):
        DistillConfig("file", weight=0.0)
    with pytest.raises(UserError, match=r"train\.distill\.fill_unknown: set train\.distill\.predictions"):
        DistillConfig(fill_unknown=True)
    with pytest.raises(UserError, match=r"train\.consistency: is about texts, which the model does not read"):
        compose(["recipe=quickstart", "model.modalities=[image]", "train.consistency.weight=1"])
