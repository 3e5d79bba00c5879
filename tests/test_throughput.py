"""What a line of the log says about speed: tokens, padding, model FLOPs utilisation, shares of time; and the profile."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from media_posts import layout, media_config, media_post
from rank_models import alone
from rank_training import arguments, token_lengths, write_shards
from test_planning import MODELS, config_of
from tiny_models import BOTH, NEITHER, ONLY_IMAGES, POSTS, TAXONOMY, batch_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crossguard.configs.compose import compose, group_choices
from crossguard.configs.gpus import figures_of
from crossguard.train import phase_times, phases
from crossguard.train.compute import Compute, find_compute
from crossguard.train.models import build_model
from crossguard.train.optimizer import freeze
from crossguard.train.phase_times import MOST_MARKS, PhaseTimes
from crossguard.train.planning.flops import PostFlops
from crossguard.train.profiling import STEPS, WARM_UP
from crossguard.train.ranks import Ranks
from crossguard.train.throughput import SHARES, Throughput, Work
from crossguard.train.tokenizers import load_tokenizer
from crossguard.train.training import run_training

CPU = torch.device("cpu")
GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run directory of eight steps, with evaluations, checkpoints and a profile."""
    folder = tmp_path_factory.mktemp("job")
    write_shards(folder)
    overrides = ["train.max_steps=8", "train.profile=true", "evaluation.every_steps=3", "checkpoint.every_steps=5"]
    run_training(compose(arguments(folder, "run", *overrides)), alone())
    return folder


def training_lines(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "train"]


def test_tokens_are_those_of_the_posts_of_the_step(job: Path) -> None:
    tokens = token_lengths(job)
    samples = [json.loads(line) for line in (job / "run/samples/rank-00000.jsonl").read_text().splitlines()]
    lines = training_lines(job / "run")
    assert [line["step"] for line in lines] == [*range(1, 9)]
    for line, sample in zip(lines, samples, strict=True):
        lengths = [tokens[post] for post in sample["ids"]]
        assert line["tokens_per_second"] / line["samples_per_second"] == pytest.approx(sum(lengths) / 8)
        places = sum(2 * max(lengths[start : start + 2]) for start in range(0, 8, 2))  # Micro-batches of two.
        assert line["padding"] == pytest.approx(1 - sum(lengths) / places)
        assert "mfu" not in line  # On CPU.


def test_every_line_tells_where_its_time_went(job: Path) -> None:
    lines = training_lines(job / "run")
    for line in lines:
        shares = {key: line[key] for key in SHARES.values()}
        assert sum(shares.values()) <= 1 + 1e-9
        assert min(shares[f"time.{name}"] for name in ("data", "forward", "backward", "step", "log")) > 0
        assert line["data_wait"] >= line["time.data"]
    # What comes after a step is told in the line of the next one.
    assert [line["step"] for line in lines if line["time.evaluation"] > 0] == [4, 7]
    # So is the checkpoint of a better evaluation.
    assert {6} <= {line["step"] for line in lines if line["time.checkpoint"] > 0} <= {4, 6, 7}


def test_a_profile_shows_phases_and_shapes_and_no_post(job: Path) -> None:
    content = gzip.decompress((job / "run/profile/rank-00000.json.gz").read_bytes()).decode()
    events = json.loads(content)["traceEvents"]
    shown = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    # Four micro-batches a step.
    assert [shown.count(name) for name in (phases.DATA, phases.FORWARD, phases.BACKWARD)] == [
        STEPS,
        4 * STEPS,
        4 * STEPS,
    ]
    assert any(event.get("args", {}).get("Input Dims") for event in events)
    posts = [json.loads(line) for line in (job / "posts.jsonl").read_text().splitlines()]
    texts = [post["text"] for post in posts if len(post["text"]) > 10]  # "def" is a word of the profiler's, too.
    assert len(texts) > 50
    assert not [text for text in texts if text in content]
    assert not [post["id"] for post in posts if f'"{post["id"]}"' in content]


def test_a_short_run_says_why_it_has_no_profile(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_training(compose(arguments(job, "short", f"train.max_steps={WARM_UP}", "train.profile=true")), alone())
    assert "no profile: it begins after 3 steps" in capsys.readouterr().err
    assert not (job / "short" / "profile").exists()


class Clock:
    """Seconds, and events of a GPU that has this time."""

    now = 0.0
    made = 0
    synchronized = 0.0

    def __init__(self, *, enable_timing: bool):
        assert enable_timing
        Clock.made += 1
        self.at = -1.0

    def record(self) -> None:
        self.at = Clock.now

    def synchronize(self) -> None:
        Clock.synchronized = self.at

    def elapsed_time(self, later: Clock) -> float:
        assert later.at <= Clock.synchronized  # torch raises where it has not happened.
        return (later.at - self.at) * 1e3


@pytest.fixture(params=[CPU, GPU], ids=["cpu", "gpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device whose clock is `Clock.now`."""
    Clock.now, Clock.made = 0.0, 0
    monkeypatch.setattr(phase_times.time, "perf_counter", lambda: Clock.now)
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    device: torch.device = request.param
    return device


def pass_phases(times: PhaseTimes, *passed: tuple[str, float]) -> None:
    for name, seconds in passed:
        times.enter(name)
        Clock.now += seconds


def test_phases_end_where_the_next_one_begins(device: torch.device) -> None:
    times = PhaseTimes(device)
    Clock.now += 1
    pass_phases(times, (phases.DATA, 2), (phases.FORWARD, 3), (phases.BACKWARD, 4), (phases.FORWARD, 5))
    assert times.take() == {"": 1, phases.DATA: 2, phases.FORWARD: 8, phases.BACKWARD: 4}
    Clock.now += 6
    assert times.take() == {phases.FORWARD: 6}


def test_many_phases_in_one_window_are_added_up_in_between(device: torch.device) -> None:
    times = PhaseTimes(device)
    for _ in range(3 * MOST_MARKS):
        pass_phases(times, (phases.DATA, 1), (phases.STEP, 2))
    assert times.take() == {"": 0, phases.DATA: 3 * MOST_MARKS, phases.STEP: 6 * MOST_MARKS}
    assert Clock.made <= MOST_MARKS + 2


def test_rates_leave_out_checkpoints_and_evaluations(device: torch.device) -> None:
    compute = Compute(PostFlops((0.0,) * 6), peak=1e6)
    throughput = Throughput(device, compute)
    done = ((phases.DATA, 1), (phases.FORWARD, 2), (phases.EVALUATION, 4), (phases.CHECKPOINT, 12), (phases.STEP, 1))
    pass_phases(throughput.times, *done)
    throughput.add(Work(posts=16, tokens=30, places=80, kiloflops=500))
    throughput.add(Work(posts=16, tokens=30, places=40, kiloflops=500))
    rates = {"samples_per_second": 8, "tokens_per_second": 15, "padding": 0.5, "mfu": 0.25, "data_wait": 0.25}
    shares = {"time.data": 0.05, "time.forward": 0.1, "time.evaluation": 0.2, "time.checkpoint": 0.6, "time.step": 0.05}
    assert throughput.take() == rates | dict.fromkeys(SHARES.values(), 0) | shares


@pytest.mark.parametrize("frozen", [[], ["text.*"], ["image.*"]], ids=str)
@pytest.mark.parametrize("name", ["both", "modernbert", "convnext"])
def test_operations_are_those_that_torch_counts(name: str, frozen: list[str]) -> None:
    config = config_of(MODELS[name], freeze=frozen)
    model = build_model(config.model, TAXONOMY, load_tokenizer(config.model.text), 0)
    freeze(model, frozen)
    flops = PostFlops.of_model(config)
    posts = [post for post in POSTS if post.images and post.input_ids is not None]
    assert {len(post.images) for post in posts} == {1, 3}
    counted = []
    for post in posts:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(batch_of(post)).sum().backward()
        counted.append(counter.get_total_flops())
        assert flops.of(batch_of(post)) == pytest.approx(counted[-1], rel=1e-6)
    # Beside each other as well: padding is none of a post's operations.
    assert flops.of(batch_of(*posts)) == pytest.approx(sum(counted), rel=1e-6)
    # Nor are the token and the image that stand in for those that a post lacks.
    assert flops.of(batch_of(NEITHER)) < flops.of(batch_of(ONLY_IMAGES)) < flops.of(batch_of(BOTH, ONLY_IMAGES))


def test_operations_of_text_alone() -> None:
    config = config_of(MODELS["text"])
    model = build_model(config.model, TAXONOMY, load_tokenizer(config.model.text), 0)
    batch = batch_of(POSTS[1])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch).sum().backward()
    assert PostFlops.of_model(config).of(batch) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_operations_of_videos_and_sound() -> None:
    config = config_of(media_config())
    model = build_model(config.model, TAXONOMY, load_tokenizer(config.model.text), 0)
    flops = PostFlops.of_model(config)
    full = batch_of(media_post(config.model, 1, 40, 2, 3, 100), **layout(config.model))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(full).sum().backward()
    assert flops.of(full) == pytest.approx(counter.get_total_flops(), rel=1e-6)
    without = batch_of(media_post(config.model, 1, 40, 2, 0, 0), **layout(config.model))
    assert flops.of(without) < 0.8 * flops.of(full)


def test_a_gpu_is_known_by_the_name_that_torch_gives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {gpu: figures_of(name) for gpu, name in NAMES.items()}
    assert {gpu: figures and figures.gpu for gpu, figures in found.items()} == {gpu: gpu for gpu in NAMES}
    assert set(NAMES) == set(group_choices("cluster")) - {"cpu"}
    # Other boards of the same chip have other peaks.
    assert figures_of("NVIDIA H100 PCIe") is figures_of("NVIDIA L40") is None
    own = tmp_path / "configs" / "cluster" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(FIGURES)
    monkeypatch.chdir(tmp_path)
    mine = figures_of("My Own GPU")
    assert mine is not None
    assert mine.fp32_tflops == 7


NAMES = {
    "a100-40gb": "NVIDIA A100-SXM4-40GB",
    "a100-80gb": "NVIDIA A100-SXM4-80GB",
    "b200-180gb": "NVIDIA B200",
    "h100-80gb": "NVIDIA H100 80GB HBM3",
    "h200-141gb": "NVIDIA H200",
    "l4-24gb": "NVIDIA L4",
    "l40s-48gb": "NVIDIA L40S",
}
FIGURES = """{gpu: mine, device_names: [My Own GPU], memory_gib: 8, fp32_tflops: 7, bf16_tflops: 70, memory_gb_per_s: 100,
  intra_node_gb_per_s: 10, inter_node_gb_per_s: 1}"""


@pytest.mark.parametrize(("precision", "peak"), [("fp32", 67e12), ("bf16", 989e12)])
def test_the_peak_is_that_of_the_precision(precision: str, peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(replace(MODELS["text"]), precision=precision)
    ranks = Ranks(0, 0, 1, GPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    compute = find_compute(config, ranks)
    assert compute is not None
    assert compute.peak == peak
    assert Work.of([batch_of(POSTS[1])], compute).kiloflops == round(compute.flops.of(batch_of(POSTS[1])) / 1e3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert find_compute(config, ranks) is None
    assert find_compute(config, replace(ranks, device=CPU)) is None
