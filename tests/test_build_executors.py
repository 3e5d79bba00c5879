"""Executors: processes and Ray write the same bytes; a process that dies is told, and the next build goes on."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from build_job import build, files_of, make_config, make_posts, picture, write_lines
from executor_tasks import die, fail, square, write_or_die

from crossguard.configs.errors import JobError, UserError
from crossguard.data.shards.executor import Executor, Processes, RayTasks

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: pip install 'crossguard[ray]'")
EXECUTORS = [pytest.param("processes"), pytest.param("ray", marks=needs_ray)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One local cluster for all tests here, since a start takes seconds."""
    if not HAS_RAY:
        yield
        return
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest, cluster: None) -> Executor:
    return Processes(2) if request.param == "processes" else RayTasks(2, None)


def media_posts(folder: Path, count: int) -> Path:
    """Text posts, every third of them with a picture, and one whose picture is missing."""
    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(picture())
    posts = [{**post, "image": "a.png"} if n % 3 == 0 else post for n, post in enumerate(make_posts(count))]
    return write_lines(folder / "posts.jsonl", [*posts, {"id": "bad", "image": "gone.png", "labels": {}}])


def test_results_come_with_their_tasks(executor: Executor, tmp_path: Path) -> None:
    assert dict(executor.run(square, range(20), [tmp_path])) == {number: number**2 for number in range(20)}
    assert list(executor.run(square, [])) == []


def test_errors_of_a_task_arrive_as_they_are(executor: Executor) -> None:
    with pytest.raises(UserError, match="^1 is wrong$"):
        list(executor.run(fail, [1, 1]))
    with pytest.raises(OSError, match="no space") as caught:
        list(executor.run(fail, [0, 0]))
    assert caught.value.filename == "somewhere"


def test_a_process_that_dies_is_one_clear_error(executor: Executor) -> None:
    with pytest.raises(
        JobError, match=r"a worker process was killed \(out of memory\?\); start again, a build goes on"
    ):
        list(executor.run(die, [1, 2, 3]))


@pytest.mark.parametrize("kind", EXECUTORS)
def test_a_build_goes_on_after_the_death_of_a_process(
    kind: str, cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    posts = media_posts(tmp_path / "posts", 40)
    whole = build(make_config(posts, max_refused=0.1), tmp_path / "whole")
    config = make_config(posts, max_refused=0.1, num_workers=2, executor=kind)
    monkeypatch.setattr("crossguard.data.shards.build.write_shard", write_or_die)
    with pytest.raises(JobError, match="start again"):
        build(config, tmp_path / "run")
    assert not (tmp_path / "run/shards/manifest.json").exists()
    monkeypatch.undo()
    assert build(config, tmp_path / "run") == whole
    assert files_of(tmp_path / "run/shards") == files_of(tmp_path / "whole/shards")


@needs_ray
@pytest.mark.parametrize("workers", [1, 3])
def test_ray_writes_what_processes_write(workers: int, cluster: None, tmp_path: Path) -> None:
    posts = tmp_path / "posts"
    settings: dict[str, Any] = {"max_refused": 0.1, "append": True, "samples_per_shard": 4}
    for count in (20, 40):
        lines = media_posts(posts, count)
        one = build(make_config(lines, **settings), tmp_path / "one")
        other = build(make_config(lines, **settings, executor="ray", num_workers=workers), tmp_path / "other")
        assert one == other
    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")
    assert one.version == 2


@needs_ray
def test_a_machine_that_does_not_see_the_folders_says_so(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=rf"node \S+ does not see {tmp_path}/nowhere; .* share"):
        list(RayTasks(1, None).run(square, [1], [tmp_path, tmp_path / "nowhere"]))


def test_without_ray_the_way_to_install_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    posts = write_lines(tmp_path / "p.jsonl", make_posts(3))
    with pytest.raises(UserError, match=r"^build.executor=ray: Ray is not installed; pip install 'crossguard\[ray\]'$"):
        build(make_config(posts, executor="ray"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
