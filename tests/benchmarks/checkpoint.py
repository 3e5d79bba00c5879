"""Saving and reshaping the state of a model of 100 M parameters (fp32, AdamW), against DeepSpeed's own.

Two ranks under ZeRO-2 save in turns: DeepSpeed, ours in front, ours in the background. One rank under ZeRO-3 then loads
what ours wrote, every hash checked, while `ds_to_universal` only converts what DeepSpeed wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from table import Line, show

# Of saving; and of converting, which takes longer.
ROUNDS, CONVERSIONS = 3, 2
LAYERS, WIDTH = 24, 2048
RANKS, STAGE, STAGE_AFTER = 2, 2, 3
# Without it, `ds_to_universal` refuses what DeepSpeed saved under ZeRO-1 and 2.
CLIENT_STATE = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}


def new_engine(stage: int) -> Any:
    """The model under DeepSpeed, after one step, so that there are moments."""
    import torch

    from crossguard.configs.schema import Config, DataConfig, ModelConfig, TaxonomyConfig, TrainConfig, ZeroConfig
    from crossguard.configs.schema.encoders import TextEncoderConfig
    from crossguard.configs.schema.taxonomy import PolicyConfig
    from crossguard.train.engine import Engine
    from crossguard.train.ranks import init_ranks

    torch.manual_seed(0)
    config = Config(
        recipe="benchmark",
        taxonomy=TaxonomyConfig("benchmark", "1", [PolicyConfig("a")]),
        data=DataConfig(source="synthetic"),
        model=ModelConfig(modalities=["text"], text=TextEncoderConfig(config={"model_type": "bert"})),
        train=TrainConfig(batch_size=2, lr=1e-4),
        zero=ZeroConfig(stage=stage),
    )
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    engine = Engine(model, config, init_ranks(), 1)
    engine.backward(engine(torch.rand(1, WIDTH)).sum())
    engine.step(1e-4)
    return engine


def cost(engine: Any, act: Callable[[], object], complete: Callable[[], object]) -> dict[str, float]:
    """Seconds for which the slowest rank is blocked, and CPU seconds of all ranks until all is complete."""
    engine.ranks.gather(None)
    cpu, start = time.process_time(), time.perf_counter()
    act()
    blocked = time.perf_counter() - start
    complete()
    everyone = engine.ranks.gather((blocked, time.process_time() - cpu))
    return {"blocked": max(seconds for seconds, _ in everyone), "cpu": sum(seconds for _, seconds in everyone)}


def save_in_turns(folder: Path) -> None:
    """On every rank."""
    from crossguard.train.checkpoint_saving import CheckpointSaver

    engine = new_engine(STAGE)
    front = CheckpointSaver(folder / "front", engine, keep_last=1)
    background = CheckpointSaver(folder / "background", engine, keep_last=1, in_background=True)
    rounds: list[dict[str, dict[str, float]]] = []
    for step in range(1, ROUNDS + 2):  # The first only warms up.
        state = {"step": step, "config": {}}
        ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "deepspeed": (
                lambda: engine.deepspeed.save_checkpoint(folder / "deepspeed", "saved", client_state=CLIENT_STATE),
                lambda: None,
            ),
            "front": (lambda state=state: front.save(state, {}), front.finish),  # type: ignore[misc]
            "background": (lambda state=state: background.save(state, {}), background.finish),  # type: ignore[misc]
        }
        rounds.append({name: cost(engine, *way) for name, way in ways.items()})
    if engine.ranks.is_first:
        (folder / "saved.json").write_text(json.dumps(rounds[1:]))


def load(folder: Path) -> None:
    """On one rank: print the seconds for checking and loading what two ranks have saved."""
    from crossguard.train.checkpoint import load_checkpoint, newest_valid

    engine = new_engine(STAGE_AFTER)
    start = time.perf_counter()
    checkpoint = newest_valid(folder / "background", engine.ranks)
    assert checkpoint is not None
    load_checkpoint(checkpoint, engine, seed=0)
    print(time.perf_counter() - start)


def convert(folder: Path) -> None:
    """Print the seconds that DeepSpeed's conversion takes, its imports done."""
    from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal

    source, target = str(folder / "deepspeed" / "saved"), str(folder / "deepspeed" / "universal")
    arguments = argparse.Namespace(input_folder=source, output_folder=target, num_extract_workers=4)
    arguments.__dict__ |= {"num_merge_workers": 2, "keep_temp_folder": False, "strict": True}
    arguments.inject_missing_state = False
    start = time.perf_counter()
    ds_to_universal(arguments)
    print(time.perf_counter() - start)
    shutil.rmtree(target)


def run(*command: str) -> str:
    """What a process prints; it says what went wrong, should anything."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def seconds(part: str, folder: Path) -> float:
    """The last line that a part prints, in a process of its own."""
    return float(run(__file__, part, str(folder)).splitlines()[-1])


def main() -> bool:
    """Measure and compare; whether all targets are reached."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run("-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "--standalone", __file__, "save", name)
        rounds = json.loads((folder / "saved.json").read_text())
        turns = [(seconds("load", folder), seconds("convert", folder)) for _ in range(CONVERSIONS)]
        ours, peer = (median(times) for times in zip(*turns, strict=True))

    def middle(way: str, measure: str) -> float:
        return median(one[way][measure] for one in rounds)

    blocked, cpu = middle("deepspeed", "blocked"), middle("deepspeed", "cpu")
    return show(
        "Checkpoints of 100 M parameters, against DeepSpeed's",
        [
            Line("time blocked by a save in the background", middle("background", "blocked"), blocked, 0.35, "s"),
            Line("CPU time of a save in the background, all ranks", middle("background", "cpu"), cpu, 1.5, "s"),
            Line(
                "time blocked by a save in front, flushed to the disk", middle("front", "blocked"), blocked, None, "s"
            ),
            Line("check and load on 1 rank, ZeRO-3, against ds_to_universal", ours, peer, 0.5, "s"),
        ],
    )


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if len(sys.argv) > 1:
        {"save": save_in_turns, "load": load, "convert": convert}[sys.argv[1]](Path(sys.argv[2]))
        sys.stdout.flush()
        os._exit(0)
    sys.exit(not main())
