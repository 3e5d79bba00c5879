"""The engine: every ZeRO stage, rank count and micro-batch equals a bare PyTorch loop; parameter groups; schedule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from deepspeed import DeepSpeedEngine
from rank_models import TinyModel, alone, run_ranks, tiny_config

from crossguard.configs.deepspeed_owned import check_owned
from crossguard.configs.errors import UserError
from crossguard.configs.schema import TrainConfig
from crossguard.train.deepspeed_settings import deepspeed_config
from crossguard.train.engine import Engine
from crossguard.train.optimizer import build_optimizer, freeze, layer_factors, learning_rate

HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """How far each case is from the bare loop."""
    output = tmp_path_factory.mktemp("engine") / "found.json"
    run_ranks(request.param, HERE / "rank_engine.py", str(output))
    differences: dict[str, dict[str, float]] = json.loads(output.read_text())
    return differences


def test_fp32_equals_one_big_batch(found: dict[str, dict[str, float]]) -> None:
    """DeepSpeed's own accumulation loses gradients in stages 1 and 2 when `backward` is called twice before `step`."""
    cases = {name: case for name, case in found.items() if name.startswith(("fp32", "n-grams"))}
    assert len(cases) == 16
    for name, case in cases.items():
        assert max(case.values()) < 1e-6, name


def test_bf16_is_close_to_one_big_batch(found: dict[str, dict[str, float]]) -> None:
    """Only the forward pass rounds: weights and moments stay fp32."""
    cases = {name: case for name, case in found.items() if name.startswith("bf16")}
    assert len(cases) == 8
    for name, case in cases.items():
        assert max(case.values()) < 1e-3, name


def test_the_engine_is_deepspeed_s_whatever_accelerate_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """With this variable accelerate leaves DeepSpeed out without a word."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for stage in range(4):
        engine = Engine(TinyModel(), tiny_config(stage), alone(), 16)
        assert isinstance(engine.deepspeed, DeepSpeedEngine)
        assert engine.deepspeed.zero_optimization_stage() == stage
        engine.close()


def test_no_decay_for_vectors_and_none_of_the_frozen() -> None:
    model, train = TinyModel(), tiny_config(weight_decay=0.1).train
    freeze(model, train.freeze)
    groups = build_optimizer(model, train).param_groups
    decay = {group["weight_decay"]: {id(parameter) for parameter in group["params"]} for group in groups}
    assert decay == {
        0.1: {id(model.inner.weight), id(model.head.weight)},
        0.0: {id(part) for part in (model.inner.bias, model.norm.weight, model.norm.bias, model.head.bias)},
    }


def test_freeze_names_the_nearest_parameter() -> None:
    with pytest.raises(UserError, match=r"'frozn\.weight' matches no parameter; did you mean 'frozen\.weight'"):
        freeze(TinyModel(), ["frozn.weight"])
    with pytest.raises(UserError, match="every parameter is frozen"):
        freeze(TinyModel(), ["*"])


def test_a_pattern_names_what_learns_faster() -> None:
    model = TinyModel()
    optimizer = build_optimizer(model, TrainConfig(lr_factors={"*": 2, "head": 10}))
    scales = {id(parameter): group["lr_scale"] for group in optimizer.param_groups for parameter in group["params"]}
    named = {name: scales[id(parameter)] for name, parameter in model.named_parameters() if id(parameter) in scales}
    assert {named["head.weight"], named["head.bias"]} == {10}
    assert named["inner.weight"] == 2
    with pytest.raises(UserError, match=r"train\.lr_factors: 'haed' matches no parameter; did you mean 'head"):
        build_optimizer(model, TrainConfig(lr_factors={"haed": 2}))
    with pytest.raises(UserError, match=r"train\.lr_factors\.head=0: must be above 0"):
        TrainConfig(lr_factors={"head": 0})


def test_layer_decay() -> None:
    names = [
        "text.encoder.embeddings.word_embeddings.weight",
        "text.encoder.encoder.layer.0.attention.self.query.weight",
        "text.encoder.encoder.layer.1.output.dense.weight",
        "image.encoder.layernorm.weight",
        "fusion.blocks.0.first.weight",
        "head.weight",
    ]
    assert list(layer_factors(names, 0.5).values()) == [0.25, 0.5, 1, 1, 1, 1]


def test_schedule() -> None:
    train = TrainConfig(lr=1.0, warmup_steps=10, min_lr_ratio=0.1)
    assert learning_rate(1, train, 110) == pytest.approx(0.1)
    assert learning_rate(10, train, 110) == pytest.approx(1.0)
    assert learning_rate(60, train, 110) == pytest.approx(0.55)
    assert learning_rate(110, train, 110) == pytest.approx(0.1)
    assert learning_rate(999, train, 110) == pytest.approx(0.1)


def test_owned_keys_are_refused_and_others_reach_deepspeed() -> None:
    with pytest.raises(
        UserError, match=r"zero\.deepspeed\.gradient_clipping: crossguard sets it; use train\.grad_clip"
    ):
        check_owned({"gradient_clipping": 1.0})
    with pytest.raises(UserError, match=r"zero_optimization\.stage: .* use zero=0"):
        check_owned({"zero_optimization": {"stage": 2}})
    for offload in ({"ratio": 0.5}, {"super_offload": True}):
        with pytest.raises(
            UserError, match=r"offload_optimizer\.(ratio|super_offload): .*second optimizer; leave it at"
        ):
            check_owned({"zero_optimization": {"offload_optimizer": {"device": "cpu", **offload}}})
    with pytest.raises(UserError, match=r"zenflow: .*second optimizer; leave it out"):
        check_owned({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}})
    check_owned({"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 1.0, "super_offload": False}}})
    config = tiny_config(stage=2)
    config.zero.deepspeed = {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    made = deepspeed_config(config, world_size=2, micro_batch_size=4)
    assert made["zero_optimization"] == {"stage": 2, "memory_efficient_linear": False, "reduce_bucket_size": 1000}
    assert made["wall_clock_breakdown"] is True
