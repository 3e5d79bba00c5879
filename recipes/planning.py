"""`crossguard plan`: prints what a job would need on a cluster, before anything runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from crossguard.configs.compose import compose

if TYPE_CHECKING:
    from crossguard.train.planning.plan import Plan, Way

GIB, GB = 1 << 30, 1e9
HEADER = (
    *("zero", "offload", "weights", "optimizer", "gradients", "buffers", "activations", "total", "fits"),
    *("largest micro-batch", "sends", "step"),
)


def plan_job(argv: list[str]) -> None:
    """Plan: `recipe=NAME [cluster.gpu=NAME] [cluster.nodes=N] [cluster.gpus_per_node=N] [key=value …] [--json]`.

    Raises:
        UserError: the configuration or the model is wrong.
    """
    as_json = "--json" in argv
    # Nothing is read of posts and shards, so a recipe need not say where they are.
    config = compose(["data.shards=shards", *(argument for argument in argv if argument != "--json")])
    from crossguard.train.planning.plan import make_plan

    plan = make_plan(config)
    print(json.dumps(plan.as_json(), indent=2) if as_json else as_table(plan), flush=True)


def as_table(plan: Plan) -> str:
    """The plan as text."""
    cluster, sizes = plan.cluster, plan.sizes
    ranks = cluster.nodes * (cluster.gpus_per_node or 1)
    micro_batch = plan.ways[0].micro_batch_size
    kept = any(way.memory.kept for way in plan.ways)
    lines = [
        f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu}, {plan.available / GIB:.1f} GiB each for the job",
        f"parameters: {sizes.parameters:,} ({sizes.trainable:,} trainable,"
        f" {sizes.parameters - sizes.trainable:,} frozen)",
        f"step: {plan.batch_size} posts over {ranks} ranks, in passes of {micro_batch};"
        f" {plan.flops / 1e12:.3g} TFLOP forward and backward, texts and images at their largest",
        "",
        "GiB of each GPU at the worst moment; bytes that it sends in a step; the step's time where nothing is slower"
        " than the hardware",
        *_rows([HEADER, *(_cells(way) for way in plan.ways)]),
        "",
        _advice(plan),
    ]
    if kept:
        lines.insert(-2, "buffers include what the C library keeps of freed memory")
    return "\n".join(lines)


def _cells(way: Way) -> tuple[str, ...]:
    memory = way.memory
    parts = (memory.weights, memory.optimizer, memory.gradients, memory.buffers + memory.kept, memory.activations)
    return (
        str(way.case.stage),
        f"{way.case.offload}{f' ({way.memory.host / GIB:.1f} in host)' if way.case.offloads else ''}",
        *(f"{part / GIB:.2f}" for part in (*parts, memory.total)),
        "yes" if way.fits else "no",
        str(way.largest_micro_batch_size),
        f"{way.communication / GB:.3g} GB",
        f"{way.time.total:.3g} s",
    )


def _rows(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _advice(plan: Plan) -> str:
    way = plan.recommended
    if way is None:
        least = min(plan.ways, key=lambda way: way.memory.total)
        return (
            f"fits nowhere: even zero={least.case.stage} with offload={least.case.offload} needs"
            f" {least.memory.total / GIB:.1f} GiB; lower model.text.max_length, model.image.size or"
            " zero.deepspeed.zero_optimization.reduce_bucket_size, set train.precision=bf16, freeze parameters"
            " (train.freeze), or take more or larger GPUs (cluster.nodes, cluster.gpu)"
        )
    settings = [f"zero={way.case.stage}", f"train.micro_batch_size={way.micro_batch_size}"]
    if way.case.offloads:
        settings.append("zero.deepspeed.zero_optimization.offload_optimizer.device=cpu")
    if way.case.offload == "optimizer+parameters":
        settings.append("zero.deepspeed.zero_optimization.offload_param.device=cpu")
    return f"take: {' '.join(settings)}  ({way.memory.total / GIB:.2f} GiB, {way.time.total:.3g} s a step)"
