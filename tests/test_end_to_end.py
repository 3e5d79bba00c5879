"""One finished job, looked at from outside: the run directory, repeated commands, exit statuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import write_posts
from rank_jobs import run_crossguard
from whole_jobs import SMALL

RUN = ["recipe=my_posts.yaml", *SMALL]


def _lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_run_directory_holds_what_the_contract_names(workspace: Path) -> None:
    run_dir = workspace / "runs" / "my_posts"
    for name in (
        "config.yaml",
        "shards/manifest.json",
        "checkpoints/latest",
        "metrics.jsonl",
        "samples/rank-00000.jsonl",
        "samples/rank-00001.jsonl",
        "logs/rank-00000.log",
        "logs/rank-00001.log",
        "predictions/test.parquet",
        "report/metrics.json",
        "report/report.html",
        "bundle/model.safetensors",
        *(f"stages/{stage}.json" for stage in ("build", "train", "evaluate", "export")),
    ):
        assert (run_dir / name).is_file(), name
    assert (run_dir / "checkpoints" / "latest").read_text() == "step-00000004"
    # Of training and of the evaluation, in one run.
    tracked = [folder.name.rpartition("-")[2] for folder in (run_dir / "wandb").glob("offline-run-*")]
    assert len(tracked) == 2
    assert len(set(tracked)) == 1
    assert not (workspace / "posts" / "runs").exists()


def test_no_absolute_path_outside_the_logs(workspace: Path) -> None:
    run_dir = workspace / "runs" / "my_posts"
    for file in run_dir.rglob("*"):
        if file.is_file() and file.relative_to(run_dir).parts[0] not in ("logs", "wandb"):
            assert str(workspace).encode() not in file.read_bytes(), file


def test_each_step_stands_once_and_the_samples_are_those_of_the_preview(workspace: Path) -> None:
    run_dir = workspace / "runs" / "my_posts"
    train = [line for line in _lines(run_dir / "metrics.jsonl") if line["split"] == "train"]
    assert [line["step"] for line in train] == [1, 2, 3, 4]
    assert all(
        {"loss", "lr", "grad_norm", "samples_per_second", "tokens_per_second", "padding", "memory_mb"} <= line.keys()
        and {"data_wait", "time.data", "time.forward", "time.backward", "time.waiting", "time.step"} <= line.keys()
        for line in train
    )
    ranks = [_lines(file) for file in sorted((run_dir / "samples").iterdir())]
    for step, of_ranks in enumerate(zip(*ranks, strict=True), 1):
        done = run_crossguard(["shards", "preview", *RUN, f"step={step}"], workspace)
        assert json.loads(done.stdout) == {"step": step, "ids": [post for line in of_ranks for post in line["ids"]]}


def test_the_metrics_have_the_contract_s_shape_and_count_known_labels(workspace: Path) -> None:
    run_dir = workspace / "runs" / "my_posts"
    metrics = json.loads((run_dir / "report" / "metrics.json").read_text())
    assert set(metrics["splits"]) == {"validation", "test"}
    assert "macro" in metrics["references"]["tfidf_logistic_regression"]
    cell = metrics["splits"]["test"]["policies"]["insult"]["all"]
    table = pq.read_table(run_dir / "predictions" / "test.parquet")
    contract = ["id", "language", "score.spam", "score.insult", "label.spam", "label.insult"]
    assert table.column_names == [*contract, "slice.modality", "slice.region"]
    known = table["label.insult"].drop_null().to_pylist()
    assert 0 < len(known) < len(table)
    assert (cell["n"], cell["positives"]) == (len(known), sum(label >= 0.5 for label in known))


def test_a_second_run_skips_every_stage(workspace: Path) -> None:
    run_dir = workspace / "runs" / "my_posts"
    before = {file: file.stat().st_mtime_ns for file in run_dir.rglob("*") if file.is_file()}
    done = run_crossguard(["run", *RUN], workspace)
    assert done.stdout.splitlines() == [
        f"{stage}: done before, skipped" for stage in ("build", "train", "evaluate", "export")
    ]
    assert {file: file.stat().st_mtime_ns for file in run_dir.rglob("*") if file.is_file()} == before


def test_a_copied_run_directory_is_still_done(workspace: Path, tmp_path: Path) -> None:
    for name in ("posts", "runs", "my_posts.yaml"):
        (shutil.copytree if (workspace / name).is_dir() else shutil.copy)(workspace / name, tmp_path / name)
    done = run_crossguard(["run", *RUN], tmp_path)
    assert done.stdout.count("skipped") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", *RUN, "train.lr=0.5"], "train.lr: was 0.0003, is now 0.5"),
        (["train", *RUN, "seed=9"], "seed: was 0, is now 9"),
        (["train", *RUN, "run_dir=runs/other"], "no shards here; run `crossguard build`"),
        (["train", *RUN, "train.batch_size=33", "train.restart=true"], "2 ranks do not divide it"),
        (["evaluate", *RUN, "evaluation.splits=[tset]"], "evaluation.splits: no split 'tset'"),
        (["evaluate", *RUN, "run_dir=runs/other", "data.shards=runs/my_posts/shards"], "no checkpoint to evaluate"),
        (["build", *RUN, "build.samples_per_shard=7"], "holds shards of other posts or settings"),
        (["build", *RUN, "data.path=nowhere", "run_dir=runs/other"], "data.path=nowhere"),
        (["predict", "bundle=runs/my_posts", "data.path=posts"], "manifest.json: unreadable"),
        (["predict", "bundle=runs/my_posts/bundle", "train.lr=1"], "train.lr=1: predict takes"),
        (["shards", "verifi"], "shards: verifi: did you mean"),
        (["shards", "preview", *RUN, "step=0"], "step=0: say step=N"),
    ],
)
def test_what_the_user_supplied_is_wrong(workspace: Path, arguments: list[str], message: str) -> None:
    done = run_crossguard([*arguments], workspace, status=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (workspace / "runs" / "other" / "shards").exists()


def test_wrong_posts_are_listed_all_at_once_and_nothing_is_left_behind(tmp_path: Path, workspace: Path) -> None:
    file = write_posts(tmp_path / "posts", count=20)
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[3] = lines[3].replace('"spam"', '"spamm"')
    lines[7] = "{not json"
    lines[11] = lines[11].replace('"split": "', '"splitt": "')
    file.write_text("\n".join(lines), encoding="utf-8")
    shutil.copy(workspace / "my_posts.yaml", tmp_path)
    done = run_crossguard(["run", "recipe=my_posts.yaml"], tmp_path, status=2)
    for line, field in ((4, "labels.spamm"), (8, ""), (12, "splitt")):
        assert f"posts.jsonl:{line}: {field}" in done.stderr
    assert not list((tmp_path / "runs").rglob("*.tar"))
