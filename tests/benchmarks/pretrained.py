"""The host's memory while a model with a pretrained encoder of 110 M parameters is built on 2 ranks: ZeRO-3, which
shares weights out as they are read, against every rank reading all of them first.

What DeepSpeed adds afterwards (moments, gradients) is the same in both. Pages of the file, which the ranks of a host
share and the kernel may drop, do not count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from table import Line, show

PARTS, WHOLE = "shared out as they are read", "whole on every rank"
RANKS = 2
# The partition is half of it; its largest tensors are whole for a moment, and the heap keeps holes.
MOST = 0.65
SECONDS_BETWEEN_LOOKS = 0.002


def main() -> bool:
    """Measure and compare; whether the target is reached."""
    with tempfile.TemporaryDirectory() as folder:
        size = save_encoder(Path(folder) / "encoder")
        peaks = {way: peak(Path(folder), way) for way in (PARTS, WHOLE)}
    lines = [Line(f"peak of a rank while {size:.0f} MB of weights are read", peaks[PARTS], peaks[WHOLE], MOST, "MB")]
    return show("Pretrained encoders under ZeRO-3", lines)


def save_encoder(folder: Path) -> float:
    """A BERT base with random weights, in bf16 as most are; returns its MB in fp32, in which it is trained."""
    import torch
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig())
    size = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    model.to(torch.bfloat16).save_pretrained(folder)
    return size


def peak(folder: Path, way: str) -> float:
    """MB of the rank that takes most."""
    output = folder / "peaks.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "--standalone"]
    subprocess.run([*launch, __file__, str(folder / "encoder"), way, str(output)], check=True, capture_output=True)
    return max(json.loads(output.read_text()))


def resident() -> float:
    """MB of memory that is no page of a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 2**10
    raise LookupError("RssAnon")


def on_a_rank(encoder: str, way: str, output: Path) -> None:
    """Build the model, and write the most memory that each rank took meanwhile."""
    from crossguard.configs.schema import Config, DataConfig, ModelConfig, TaxonomyConfig, ZeroConfig
    from crossguard.configs.schema.encoders import TextEncoderConfig
    from crossguard.configs.schema.taxonomy import PolicyConfig
    from crossguard.data.taxonomy import Taxonomy
    from crossguard.train.encode import PostEncoder
    from crossguard.train.engine import Engine
    from crossguard.train.models import Classifier, build_model
    from crossguard.train.ranks import end_process, init_ranks
    from crossguard.train.starting_model import starting_model

    def build(text: TextEncoderConfig) -> tuple[Classifier, Config]:
        config = Config(
            taxonomy=TaxonomyConfig("spam", "1", [PolicyConfig("spam")]),
            data=DataConfig(source="synthetic"),
            model=ModelConfig(modalities=["text"], text=text),
            zero=ZeroConfig(stage=3),
        )
        encode = PostEncoder(config.model, Taxonomy.from_config(config.taxonomy))
        if way == PARTS:
            return starting_model(config, ranks, encode, 1), config
        return build_model(config.model, encode.taxonomy, encode.tokenizer, config.seed), config

    ranks = init_ranks()
    tiny = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, config = build(TextEncoderConfig(config=tiny))
    Engine(model, config, ranks, 1).close()  # What is loaded at the first use.
    before, most, done = resident(), 0.0, threading.Event()

    def look() -> None:
        nonlocal most
        while not done.wait(SECONDS_BETWEEN_LOOKS):
            most = max(most, resident())

    looking = threading.Thread(target=look)
    looking.start()
    model, _ = build(TextEncoderConfig(pretrained=encoder, tokenizer="bytes"))
    done.set()
    looking.join()
    peaks = ranks.gather(most - before)
    if ranks.is_first:
        output.write_text(json.dumps(peaks))
    end_process(0)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        on_a_rank(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(not main())
