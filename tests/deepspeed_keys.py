"""Which keys the installed DeepSpeed reads from its configuration, found by watching it read.

`python tests/deepspeed_keys.py [FILE]` writes the snapshot that a misspelled key under `zero.deepspeed` is checked against.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

SNAPSHOT = Path(__file__).parent.parent / "configs" / "zero" / "deepspeed_keys.json"

# Blocks that hold free-form names of their own, so that any key in them is right.
FREE_FORM = {
    "optimizer",
    "scheduler",
    "data_efficiency",
    "curriculum_learning",
    "compression_training",
    "pipeline",
    "expert_parallel",
    "sparse_attention",
}


class Watched(dict):
    """A dictionary that notes every key that is asked for; blocks inside it are watched as well."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.asked: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.setdefault(key, None)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.setdefault(str(key), None)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.setdefault(key, None)
        return super().__getitem__(key)

    def keys(self) -> Watched:  # type: ignore[override]
        return self

    def __copy__(self) -> Watched:
        return self


def _model_keys(model: Any) -> dict[str, Any]:
    """Field names (or their aliases) of a pydantic model, nested, with the kind of value that they take."""
    keys = {}
    for name, field in type(model).model_fields.items():
        value = getattr(model, name, None)
        nested = _annotated_model(field.annotation) if value is None else value
        block = hasattr(type(nested), "model_fields")
        keys[field.alias or name] = _model_keys(nested) if block else _kind(field.annotation)
    return keys


def _kind(annotation: Any) -> str | None:
    """What a value must look like: "number", "bool", or anything."""
    types = {annotation, *getattr(annotation, "__args__", ())} - {type(None)}
    if any(getattr(part, "__args__", None) for part in types):
        types -= {annotation}
    return "bool" if types == {bool} else "number" if types and types <= {int, float} else None


def _annotated_model(annotation: Any) -> Any:
    """An instance of the pydantic model inside `Optional[Model]`, if there is one."""
    from pydantic import BaseModel

    for part in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part.model_construct()
    return None


def installed_keys() -> dict[str, Any]:
    """Every valid key: names to the kind of their value (None is any), or to the names inside the block."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.config import DeepSpeedConfig

    top = Watched({"train_micro_batch_size_per_gpu": 1})
    config = DeepSpeedConfig(top)
    # A second reading, with each block present but empty, shows what is asked for inside it.
    blocks = {}
    for name in sorted(top.asked):
        block = Watched()
        # A scalar refuses a block, and a block may have required keys: what was asked for until then is what counts.
        with contextlib.suppress(Exception):
            DeepSpeedConfig(Watched({"train_micro_batch_size_per_gpu": 1, name: block}))
        if block.asked:
            blocks[name] = block.asked
    monitors = ("tensorboard", "wandb", "csv_monitor", "comet")
    models = {
        "zero_optimization": config.zero_config,
        "fp16": config.float16_config,
        "bf16": config.bfloat16_config,
        "flops_profiler": config.flops_profiler_config,
        "hybrid_engine": config.hybrid_engine,
        "compile": config.compile_config,
        "tensor_parallel": config.tensor_parallel_config,
        "comms_logger": CommsLoggerConfig(),
        **{name: getattr(config.monitor_config, name, None) for name in monitors},
    }
    keys: dict[str, Any] = {}
    for name in sorted(top.asked):
        model = models.get(name)
        if name in FREE_FORM:
            keys[name] = None
        elif hasattr(type(model), "model_fields"):
            keys[name] = _model_keys(model)
        else:
            keys[name] = blocks.get(name)
    return keys


if __name__ == "__main__":
    (Path(sys.argv[1]) if sys.argv[1:] else SNAPSHOT).write_text(
        json.dumps(installed_keys(), indent=1, sort_keys=True) + "\n"
    )
