"""`crossguard plan`: parameters, memory, communication and time from shapes, and the way to train that it recommends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from tiny_models import BERT, SIZE, TAXONOMY, VIT, model_config
from torch.utils.flop_counter import FlopCounterMode

from crossguard.configs.compose import compose
from crossguard.configs.errors import UserError
from crossguard.configs.recipe_files import available_recipes
from crossguard.configs.schema import Config, DataConfig, TaxonomyConfig, TrainConfig
from crossguard.configs.schema.cluster import ClusterConfig
from crossguard.configs.schema.taxonomy import PolicyConfig
from crossguard.train.models import build_model
from crossguard.train.optimizer import freeze
from crossguard.train.planning.memory import FP32, Case, Sizes, ZeroSettings, memory_of
from crossguard.train.planning.plan import Way, make_plan, recommend
from crossguard.train.planning.roofline import StepTime, communication_bytes, step_time
from crossguard.train.planning.shapes import Shapes, batch_of_shapes
from crossguard.train.planning.trace import Operation, Trace, at_batch, block_of
from crossguard.train.tokenizers import load_tokenizer

GIB = 1 << 30
H100 = ClusterConfig("h100-80gb", 8, 8, 79.6, 3.0, 67.0, 989.0, 3350.0, 450.0, 50.0)


def config_of(model: Any = None, cluster: ClusterConfig | None = None, **train: Any) -> Config:
    return Config(
        recipe="planned",
        taxonomy=TaxonomyConfig("test", "1", [PolicyConfig("spam"), PolicyConfig("insult")]),
        data=DataConfig(source="synthetic"),
        model=model or model_config(),
        train=TrainConfig(**train),
        cluster=cluster or ClusterConfig(gpus_per_node=2),
    )


def sizes(parameters: int, **values: int) -> Sizes:
    every = {"trainable": parameters, "bf16": parameters, "largest": 0, "heap_parameters": 0, "heap_trainable": 0}
    return Sizes(parameters, **{**every, "persistent": 0, **values})


MODELS = {
    "both": model_config(),
    "text": replace(model_config(), modalities=["text"]),
    "modernbert": model_config({"model_type": "modernbert", **{k: v for k, v in BERT.items() if "dropout" not in k and k != "model_type"}}),
    "clip": model_config(image={"model_type": "clip", "vision_config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8, "image_size": SIZE}}),
    "convnext": model_config(image={"model_type": "convnext", "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]}),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_model_that_would_be_trained(name: str) -> None:
    config = config_of(MODELS[name], freeze=["text.*embeddings*"])
    planned = Shapes(config, 2).model
    built = build_model(config.model, TAXONOMY, load_tokenizer(config.model.text), 0)
    freeze(built, config.train.freeze)
    assert {name: (tuple(p.shape), p.requires_grad) for name, p in planned.named_parameters()} == {
        name: (tuple(p.shape), p.requires_grad) for name, p in built.named_parameters()
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["both", "modernbert", "convnext"])
def test_activations_and_operations_are_those_of_a_real_pass(name: str, precision: str) -> None:
    config = config_of(MODELS[name], precision=precision)
    model = build_model(config.model, TAXONOMY, load_tokenizer(config.model.text), 0)
    batch = batch_of_shapes(config, 2, 6)
    # What is padding is not known from shapes: here nothing is left out for want of it.
    batch.text_mask[0, 1:] = False
    batch.image_post[:] = torch.arange(6).repeat_interleave(3)
    outside = {block_of(tensor) for tensor in [*model.parameters(), *model.buffers(), batch.input_ids]}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if block_of(tensor) not in outside:
            saved[block_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        ):
            logits = model(batch)
        logits.sum().backward()

    planned = Shapes(config, 2).trace(6)
    assert planned.saved == pytest.approx(sum(saved.values()), rel=0.02)
    # torch 2.13 does not count the fused attention of CPUs; ours is the count of the same matrix products.
    assert planned.flops >= counter.get_total_flops()
    assert planned.flops == pytest.approx(counter.get_total_flops(), rel=0.25)
    assert planned.activations >= planned.saved


def test_another_batch_is_on_the_line_through_two() -> None:
    shapes = Shapes(config_of(), 2)
    expected, found = shapes.trace(9), at_batch(shapes.trace(2), shapes.trace(4), 9)
    assert found.saved == pytest.approx(expected.saved, rel=0.01)
    assert found.activations == pytest.approx(expected.activations, rel=0.02)
    assert found.flops == pytest.approx(expected.flops, rel=1e-6)


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_model_states_are_those_of_deepspeed_s_estimators(ranks: int) -> None:
    count = 1_000_000_000
    nothing = replace(ZeroSettings(), reduce_bucket=1, max_live=0)

    def states(stage: int) -> float:
        memory = memory_of(Case(stage, "none", ranks, 2, False, False), sizes(count), nothing, Trace(1))
        return 3 * FP32 * count / ranks + FP32 * count if stage == 2 else memory.weights + 2 * FP32 * count / ranks

    _, two = estimate_zero2_model_states_mem_needs(count, ranks, cpu_offload=False)
    _, three, _ = estimate_zero3_model_states_mem_needs(count, 0, ranks, cpu_offload=False)
    gradients = FP32 * count / ranks
    # DeepSpeed counts 16-bit weights and gradients beside fp32 ones. Here all are fp32: whole weights take 2 bytes
    # more, and what is partitioned 2 bytes less, since there are no gradients of 16 bits.
    assert states(2) + gradients == two + 2 * count - 2 * count / ranks
    # Stage 3 updates the partition of the weights itself, without a master beside it.
    assert states(3) + gradients == three - 2 * count / ranks


def test_stages_share_out_what_they_say() -> None:
    count, trace = 10_000_000_000, Trace(1, 1e9, 1e9)
    memory = {
        stage: memory_of(Case(stage, "none", 8, 4, True, False), sizes(count), ZeroSettings(), trace)
        for stage in range(4)
    }
    assert memory[0].optimizer == 8 * count
    assert memory[1].optimizer == memory[2].optimizer == 12 * count / 8
    assert memory[3].optimizer == 8 * count / 8
    assert memory[1].gradients == pytest.approx(4 * count, rel=0.06)
    assert memory[2].gradients == memory[3].gradients == 4 * count / 8
    assert memory[0].total > memory[1].total > memory[2].total
    offloaded = memory_of(Case(2, "optimizer", 8, 4, True, False), sizes(count), ZeroSettings(), trace)
    assert offloaded.optimizer == 0
    assert offloaded.host >= 16 * count / 8


def test_buckets_are_those_of_the_configuration() -> None:
    def buffers(**settings: Any) -> float:
        zero = ZeroSettings.of({"zero_optimization": settings})
        return memory_of(Case(2, "none", 8, 1, False, False), sizes(10**9), zero, Trace(1)).buffers

    # A bucket, and the copy of it that is reduced.
    assert buffers() == 2 * 4 * 500_000_000
    assert buffers(reduce_bucket_size="5e7", allgather_bucket_size=0) == 2 * 4 * 50_000_000
    assert buffers(overlap_comm=True) == 3 * 4 * 500_000_000


def test_communication_is_that_of_rings() -> None:
    def sent(stage: int, accumulation: int = 1, bf16: bool = False) -> float:
        return communication_bytes(Case(stage, "none", 8, accumulation, bf16, False), sizes(1000)) / (7 / 8)

    assert sent(0, 4) == 2 * 4000
    assert sent(1, 4) == 2 * 4000 + 4000
    assert sent(2, 4) == 4 * 2 * 4000 + 4000
    assert sent(3, 4) == 4 * 3 * 4000
    assert sent(2, 1, bf16=True) == 2 * 2000 + 4000
    assert sent(3, 1, bf16=True) == 3 * 2000
    assert communication_bytes(Case(0, "none", 1, 1, False, False), sizes(1000)) == 0


def test_time_is_that_of_the_slower_of_arithmetic_and_memory() -> None:
    trace = Trace(1, operations=[Operation(989e12, 0), Operation(0, 2 * 3350e9)])
    time = step_time(Case(0, "none", 64, 3, True, False), sizes(3350 * 10**9 // 28), trace, H100)
    assert time.compute == pytest.approx(3 * (1 + 2))
    assert time.update == pytest.approx(1)
    # 8 adapters of 50 GB/s carry what 8 GPUs send to the next machine.
    sent = communication_bytes(Case(0, "none", 64, 3, True, False), sizes(3350 * 10**9 // 28))
    assert time.communication == pytest.approx(sent / 400e9)


def way(stage: int, *, fits: bool, largest: int) -> Way:
    memory = memory_of(Case(stage, "none", 1, 1, False, False), sizes(1), ZeroSettings(), Trace(1))
    return Way(Case(stage, "none", 1, 1, False, False), 8, memory, fits, largest, 0.0, StepTime(0.0, 0.0, 0.0))


def test_the_lowest_stage_that_fits_is_recommended() -> None:
    small, middle, large = way(0, fits=False, largest=0), way(1, fits=False, largest=2), way(2, fits=True, largest=8)
    assert recommend([small, middle, large]) is large
    assert recommend([small, middle]) is middle
    assert recommend([small]) is None


def test_a_large_model_needs_a_higher_stage_and_one_too_large_fits_nowhere() -> None:
    text = {"model_type": "bert", "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 16384}
    text |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

    def planned(layers: int) -> Any:
        model = replace(model_config({**text, "num_hidden_layers": layers}), modalities=["text"])
        return make_plan(config_of(model, H100, precision="bf16", batch_size=1024, micro_batch_size=16))

    plan = planned(32)
    assert plan.sizes.parameters > 6_000_000_000
    assert plan.recommended.case.stage == 2
    assert [way.fits for way in plan.ways[:3]] == [False, False, True]
    assert plan.recommended.memory.total <= plan.available
    assert plan.recommended.micro_batch_size == plan.recommended.largest_micro_batch_size == 16
    assert planned(1600).recommended is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_as_json(precision: str) -> None:
    plan = json.loads(json.dumps(make_plan(config_of(cluster=H100, precision=precision)).as_json()))
    assert set(plan) == {
        *("cluster", "parameters", "batch_size", "flops_per_step", "available_bytes", "ways", "recommended")
    }
    assert plan["parameters"]["total"] == plan["parameters"]["trainable"] + plan["parameters"]["frozen"]
    assert [(way["zero"], way["offload"]) for way in plan["ways"]][:4] == [(stage, "none") for stage in range(4)]
    parts = plan["ways"][1]["memory_bytes"]
    names = ("weights", "optimizer", "gradients", "buffers", "activations", "kept")
    assert parts["total"] == pytest.approx(sum(parts[name] for name in names))
    assert set(plan["recommended"]) == {"zero", "offload", "micro_batch_size", "memory_bytes", "step_seconds"}


def test_a_pretrained_encoder_s_weights_are_not_read(tmp_path: Path) -> None:
    from transformers import BertConfig, SiglipConfig

    tower = {key: value for key, value in VIT.items() if key != "model_type"} | {"image_size": SIZE}
    small = {key: value for key, value in BERT.items() if key != "model_type"}
    BertConfig(**small, vocab_size=300).save_pretrained(tmp_path / "text")
    SiglipConfig(vision_config=tower, text_config=small).save_pretrained(tmp_path / "image")
    model = model_config()
    model = replace(
        model,
        text=replace(model.text, config={}, pretrained=str(tmp_path / "text")),
        image=replace(model.image, config={}, pretrained=str(tmp_path / "image")),
    )
    names = {name for name, _ in Shapes(config_of(model), 2).model.named_parameters()}
    assert "text.encoder.embeddings.word_embeddings.weight" in names
    assert any(name.startswith("image.encoder.encoder.layers.1") for name in names)


def test_ranks_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(UserError, match="choose a multiple of 64"):
        make_plan(config_of(cluster=H100, batch_size=100))


RECIPES = sorted(available_recipes())


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_shipped_recipe_can_be_planned_without_posts(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    from crossguard.recipes.planning import plan_job

    plan_job([f"recipe={recipe}", "cluster.nodes=2", "cluster.gpus_per_node=8", "cluster.gpu=a100-40gb"])
    printed = capsys.readouterr().out
    assert "2 x 8 a100-40gb" in printed
    assert "take: zero=0 " in printed
    plan_job([f"recipe={recipe}", "--json"])
    assert json.loads(capsys.readouterr().out)["cluster"]["gpu"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["recipe=quickstart", "cluster.gpu=h100"], "did you mean 'h100-80gb'"),
        (["recipe=quickstart", "cluster.nodes=0"], "cluster.nodes=0: must be at least 1"),
        (["recipe=quickstart", "cluster.node=2"], "did you mean 'nodes'"),
    ],
)
def test_a_wrong_configuration_is_told_before_torch_is_imported(arguments: list[str], said: str) -> None:
    code = f"import sys; from crossguard.recipes.cli import _run; print(_run(['plan', *{arguments!r}]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.stdout.split() == ["2", "False"], done.stderr
    assert said in done.stderr


def test_the_name_of_a_gpu_must_be_that_of_its_file(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("defaults: [override /model: small, override /taxonomy: stand_ins]\ndata: {source: synthetic}\ncluster: {gpu: h100-80gb}\n")
    with pytest.raises(UserError, match="override /cluster: h100-80gb"):
        compose([f"recipe={recipe}"])
    recipe.write_text("defaults: [override /model: small, override /taxonomy: stand_ins, override /cluster: l4-24gb]\ndata: {source: synthetic}\n")
    assert compose([f"recipe={recipe}"]).cluster.fp32_tflops == 30.3
