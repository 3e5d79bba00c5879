"""Evaluation on the validation split during training, and the one number that decides which checkpoint is the best."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from crossguard.configs.schema import Config
from crossguard.data.loading.reader import ShardReader
from crossguard.data.shards.folder import ShardFolder
from crossguard.train.embeddings import EmbeddingCache
from crossguard.train.encode import PostEncoder
from crossguard.train.engine import Engine
from crossguard.train.evaluation.metrics import evaluate_predictions
from crossguard.train.evaluation.scoring import score_split
from crossguard.train.fragments import averaged_weights
from crossguard.train.step_log import StepLog, flat

logger = logging.getLogger(__name__)
SPLIT = "validation"
Validate = Callable[[int], float | None]


def open_validation(
    config: Config,
    engine: Engine,
    encode: PostEncoder,
    folder: ShardFolder,
    log: StepLog,
    on_refused: Callable[[dict[str, Any]], None],
    cache: EmbeddingCache | None = None,
) -> Validate | None:
    """A function of the step that scores the validation split over all ranks, logs the metrics and returns the one
    that `checkpoint.metric` names; None where the configuration asks for no evaluation.

    Posts of a split lie in the order of a hash, so that the first ones are a fair sample where not all are taken.

    Raises:
        UserError: there is no validation split.
    """
    if not config.evaluation.every_steps:
        return None
    reader = ShardReader([folder], SPLIT)
    now = engine.ranks.broadcast(time.time())  # One clock decides which posts have expired.
    rows = reader.readable_rows(now)[: config.evaluation.max_validation_posts]
    embeddings = None if cache is None else cache.of(reader, rows)
    refuse_once = _once(on_refused)

    def validate(step: int) -> float | None:
        with averaged_weights(engine):
            predictions = score_split(
                engine.deepspeed,
                encode,
                reader,
                rows,
                engine.ranks,
                config.evaluation.batch_size,
                num_workers=config.train.num_workers,
                on_refused=refuse_once,
                embeddings=embeddings,
            )
        metrics = evaluate_predictions(predictions, config.evaluation)
        log.evaluation(SPLIT, step, _short(metrics))
        # A metric of the user's own may draw random numbers: rank 0's value decides for all.
        value = engine.ranks.broadcast(flat(metrics).get(config.checkpoint.metric))
        if value is None:
            logger.warning("step %d: validation does not define %s", step, config.checkpoint.metric)
            engine.ranks.say(_not_defined(config.checkpoint.metric, step))
        return value

    return validate


def _not_defined(metric: str, step: int) -> str:
    return (
        f"train: checkpoint.metric={metric} is not defined on the validation split at step {step} (fewer positives or"
        " negatives than evaluation.min_positives, or no such metric; see metrics.jsonl); the last checkpoint stands in"
        " for the best one"
    )


def _once(on_refused: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """Tells of each post the first time alone: every evaluation meets it again."""
    named: set[str] = set()

    def refuse(line: dict[str, Any]) -> None:
        if (name := str(line.get("id") or line.get("key"))) not in named:
            named.add(name)
            on_refused(line)

    return refuse


def _short(metrics: dict[str, Any]) -> dict[str, Any]:
    """Without the cells of policy × language."""
    policies = {name: {"all": cells["all"]} for name, cells in metrics.get("policies", {}).items()}
    return {name: value for name, value in metrics.items() if name != "policies"} | {"policies": policies}
