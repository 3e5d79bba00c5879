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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crossguard.configs.compose import compose
from crossguard.configs.errors import UserError
from crossguard.configs.recipe_files import available_recipes
from crossguard.configs.schema import Config, DataConfig, TaxonomyConfig, TrainConfig
from crossguard.configs.schema.cluster import ClusterConfig
from crossguard.configs.schema.fusion import FusionConfig
from crossguard.configs.schema.heads import HeadConfig
from crossguard.configs.schema.loss import ConsistencyConfig
from crossguard.configs.schema.taxonomy import PolicyConfig
from crossguard.recipes.planning import as_table, plan_job
from crossguard.train.models import build_model
from crossguard.train.models.activations import checkpoint_activations
from crossguard.train.models.example import PostSize, example_batch
from crossguard.train.optimizer import freeze
from crossguard.train.planning.memory import Case, Memory, Sizes, ZeroSettings, memory_of, model_states
from crossguard.train.planning.plan import Plan, Way, make_plan, recommend
from crossguard.train.planning.roofline import StepTime, communication_bytes, step_time
from crossguard.train.planning.shapes import Shapes
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
    "modernbert": model_config(
        {"model_type": "modernbert", **{k: v for k, v in BERT.items() if "dropout" not in k and k != "model_type"}}
    ),
    "clip": model_config(
        image={
            "model_type": "clip",
            "vision_config": {
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "patch_size": 8,
                "image_size": SIZE,
            },
        }
    ),
    "cross": replace(
        model_config(),
        fusion=FusionConfig("cross", width=16, heads=2),
        heads={"insults": HeadConfig(["insult"], hidden=4), "main": HeadConfig(["spam"])},
    ),
    "convnext": model_config(image={"model_type": "convnext", "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]}),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_model_that_would_be_trained(name: str) -> None:
    config = config_of(MODELS[name], freeze=["text.*embeddings*"])
    planned = Shapes(config).model
    built = build_model(config.model, TAXONOMY, load_tokenizer(config.model.text), 0)
    freeze(built, config.train.freeze)
    assert {name: (tuple(p.shape), p.requires_grad) for name, p in planned.named_parameters()} == {
        name: (tuple(p.shape), p.requires_grad) for name, p in built.named_parameters()
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["both", "checkpointed", "modernbert", "convnext"])
def test_activations_and_operations_are_those_of_a_real_pass(name: str, precision: str) -> None:
    config = config_of(MODELS.get(name), precision=precision, gradient_checkpointing=name == "checkpointed")
    model = build_model(config.model, TAXONOMY, load_tokenizer(config.model.text), 0)
    if config.train.gradient_checkpointing:
        checkpoint_activations(model)
    batch = example_batch(config.model, 2, 6, PostSize.largest(config.model))
    # What is padding is not known from shapes: here nothing is left out for want of it.
    batch.text_mask[0, 1:] = False
    batch.image_post[:] = torch.arange(6).repeat_interleave(3)
    outside = {block_of(tensor) for tensor in [*model.parameters(), *model.buffers(), batch.input_ids]}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if block_of(tensor) not in outside:
            saved[block_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch)
    # torch's counter knows no fused attention of CPUs, but the matrix products that it consists of.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        with autocast:
            logits = model(batch)
        logits.sum().backward()

    planned = Shapes(config).trace(6)
    assert planned.saved == pytest.approx(sum(saved.values()), rel=0.02)
    assert planned.activations >= planned.saved
    # The fused backward pass computes scores once more: 7 products instead of 6.
    assert counter.get_total_flops() <= planned.flops <= counter.get_total_flops() * 7 / 6


def test_another_batch_is_on_the_line_through_two() -> None:
    shapes = Shapes(config_of())
    expected, found = shapes.trace(9), at_batch(shapes.trace(2), shapes.trace(4), 9)
    assert found.saved == pytest.approx(expected.saved, rel=0.01)
    assert found.activations == pytest.approx(expected.activations, rel=0.02)
    assert found.flops == pytest.approx(expected.flops, rel=1e-6)


def test_a_second_view_doubles_the_pass_over_texts_alone() -> None:
    def flops(modalities: list[str], weight: float) -> float:
        config = config_of(model_config(modalities=modalities), consistency=ConsistencyConfig(weight))
        return Shapes(config).trace(4).flops

    assert flops(["text"], 1.0) == pytest.approx(2 * flops(["text"], 0.0))
    assert flops(["text", "image"], 0.0) < flops(["text", "image"], 1.0) < 2 * flops(["text", "image"], 0.0)


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_model_states_are_those_of_deepspeed_s_estimators(ranks: int) -> None:
    count = 1_000_000_000

    def states(stage: int) -> float:
        return sum(model_states(Case(stage, "none", ranks, 1, False, False), sizes(count)).values())

    _, two = estimate_zero2_model_states_mem_needs(count, ranks, cpu_offload=False)
    _, three, _ = estimate_zero3_model_states_mem_needs(count, 0, ranks, cpu_offload=False)
    # DeepSpeed counts 16-bit weights and gradients beside fp32 ones. Here all are fp32: whole weights take 2 bytes
    # more, and what is partitioned 2 bytes less, since there are no gradients of 16 bits.
    assert states(2) == two + 2 * count - 2 * count / ranks
    # In stage 3 the partition of the weights is its own master: 4 bytes take the place of 6, in gradients too.
    assert states(3) == three - 2 * count / ranks
    if ranks == 1:
        assert states(2) == 20 * count
        assert states(0) == states(3) == 16 * count


def test_stages_share_out_what_they_say() -> None:
    count, trace = 10_000_000_000, Trace(1, 1e9, 1e9)

    def memory(stage: int, offload: str = "none") -> Memory:
        return memory_of(Case(stage, offload, 8, 4, True, False), sizes(count), ZeroSettings(), trace)

    assert [memory(stage).optimizer for stage in range(3)] == [8 * count, 12 * count / 8, 12 * count / 8]
    assert memory(1).gradients == pytest.approx(4 * count, rel=0.06)
    assert memory(2).gradients == 4 * count / 8
    assert memory(0).total > memory(1).total > memory(2).total > memory(3).total
    # Before it is partitioned, the whole model is on the device.
    assert memory(3).phase == "start"
    assert memory(2, "optimizer").optimizer == 0
    assert memory(2, "optimizer").host >= 16 * count / 8


def test_buckets_are_those_of_the_configuration() -> None:
    def buffers(**settings: Any) -> float:
        zero = ZeroSettings.of({"zero_optimization": settings})
        return memory_of(Case(2, "none", 8, 1, False, False), sizes(10**9), zero, Trace(1)).buffers

    # A bucket, and the copy of it that is reduced.
    assert buffers() == 2 * 4 * 500_000_000
    assert buffers(reduce_bucket_size="5e8", allgather_bucket_size="1e8") == 2 * 4 * 500_000_000
    assert buffers(reduce_bucket_size="5e7", allgather_bucket_size="1e9") == 4 * 1_000_000_000
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


def test_averages_cost_one_moment_more_and_encoders_read_in_parts_less_at_the_start() -> None:
    for stage in range(4):
        plain, averaged = (Case(stage, "none", 4, 1, False, False, averaged=on) for on in (False, True))
        more = {
            name: size - model_states(plain, sizes(1000))[name]
            for name, size in model_states(averaged, sizes(1000)).items()
        }
        assert more == {"weights": 0, "optimizer": 4000 if stage == 0 else 1000, "gradients": 0}
    whole, parts = (
        memory_of(
            Case(3, "none", 64, 1, True, False, in_parts=on),
            sizes(10**9),
            ZeroSettings(reduce_bucket=1, max_live=1, prefetch=1),
            Trace(1),
        )
        for on in (False, True)
    )
    assert whole.phase == "start"
    assert whole.weights == 4 * 10**9
    assert parts.phase != "start"
    assert parts.total < whole.total


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


def test_less_memory_leads_to_a_higher_stage_or_a_smaller_pass_and_at_last_nowhere() -> None:
    def planned(gib: float) -> Plan:
        cluster = replace(H100, memory_gib=gib, reserved_gib=0.0)
        config = config_of(None, cluster, batch_size=1024, micro_batch_size=2)
        config.zero.deepspeed = {"zero_optimization": {"reduce_bucket_size": 1, "allgather_bucket_size": 1}}
        return make_plan(config)

    ample = planned(80)
    assert ample.recommended is not None
    assert (ample.recommended.case.stage, ample.recommended.micro_batch_size) == (0, 16)
    totals = [way.memory.total for way in ample.ways]
    enough = min(totals[1:4])
    assert enough < totals[0]
    fitting = planned(enough / GIB)
    assert fitting.recommended is not None
    assert fitting.recommended.case.stage == totals.index(enough)
    assert fitting.recommended.memory.total <= fitting.available
    nowhere = planned(1e-5)
    assert nowhere.recommended is None
    assert "fits nowhere" in as_table(nowhere)
    assert "train.precision=bf16" in as_table(nowhere)


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
    names = {name for name, _ in Shapes(config_of(model)).model.named_parameters()}
    assert "text.encoder.embeddings.word_embeddings.weight" in names
    assert any(name.startswith("image.encoder.encoder.layers.1") for name in names)


def test_ranks_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(UserError, match="choose a multiple of 64"):
        make_plan(config_of(cluster=H100, batch_size=100))


# Of a pretrained encoder the configuration would come from a hub.
RECIPES = [
    name
    for name in sorted(available_recipes())
    if not compose([f"recipe={name}", "data.path=posts.jsonl"]).model.has_pretrained
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_shipped_recipe_can_be_planned_without_posts(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
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
    recipe.write_text(
        "defaults: [override /model: small, override /taxonomy: stand_ins]\ndata: {source: synthetic}\ncluster: {gpu: h100-80gb}\n"
    )
    with pytest.raises(UserError, match="override /cluster: h100-80gb"):
        compose([f"recipe={recipe}"])
    recipe.write_text(
        "defaults: [override /model: small, override /taxonomy: stand_ins, override /cluster: l4-24gb]\ndata: {source: synthetic}\n"
    )
    assert compose([f"recipe={recipe}"]).cluster.fp32_tflops == 30.3
