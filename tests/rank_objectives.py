"""Run on ranks by test_terms.py: every term at once, in every ZeRO stage, against a bare loop over whole batches."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from finetuning_job import POSTS, STEPS, apart, classifier, config_of, copy_of, loop_of, mine, posts_of
from rank_engine import largest_difference
from tiny_models import TAXONOMY, batch_of
from torch import Tensor
from torch.nn import functional as F

from crossguard.configs.schema import Config
from crossguard.configs.schema.loss import (
    AlignmentConfig,
    BalanceConfig,
    ConsistencyConfig,
    DistillConfig,
    GroupDroConfig,
    LogitAdjustmentConfig,
    LossConfig,
)
from crossguard.data.loading.collate import Batch
from crossguard.data.loading.encoded import EncodedSample
from crossguard.data.shards.manifest import ShardInfo
from crossguard.train.encode import PostEncoder
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.loop import StepResult
from crossguard.train.models import Classifier
from crossguard.train.objectives.distillation import Teacher
from crossguard.train.objectives.opening import Beside, open_objective
from crossguard.train.objectives.translations import PairFile, Translations
from crossguard.train.optimizer import build_optimizer, freeze, learning_rate
from crossguard.train.ranks import Ranks, end_process, init_ranks

LANGUAGES = ("de", "sw", "yo")
PAIRS, IN_FILE = 5, 13
LOSS = LossConfig(
    logit_adjustment=LogitAdjustmentConfig(tau=0.7),
    balance=BalanceConfig(by=["class"], exponent=0.5),
    group_dro=GroupDroConfig(step_size=0.4, adjustment=1.5),
)
# Known labels, and how many violate.
LABELS = {"de/spam": [60.0, 20.0], "de/insult": [50.0, 5.0], "sw/spam": [9.0, 1.5], "yo/insult": [4.0, 1.0]}
STRATA = {"de/benign": 64, "sw/benign": 9, "yo/unknown": 4}
SHARD = ShardInfo("train/train-00000.tar", 0, 77, "", "", STRATA, LABELS)


def config_with_all_terms(folder: Path, stage: int, **train: Any) -> Config:
    """Every term, at weights that no other has."""
    terms = {
        "loss": LOSS,
        "distill": DistillConfig(str(folder / "teacher.parquet"), weight=0.8, temperature=3.0, fill_unknown=True),
        "alignment": AlignmentConfig(str(folder / "pairs.jsonl"), weight=0.3, batch_size=PAIRS, temperature=0.2),
        "consistency": ConsistencyConfig(weight=0.6),
    }
    return config_of(stage, **({"lr": 1e-4} | terms | train))


def outspoken(config: Config) -> Classifier:
    """A model whose scores differ from the first step on."""
    model = classifier(config)
    torch.manual_seed(5)
    for parameter in model.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def write_files(folder: Path) -> None:
    """Pairs, and a teacher that does not know every third post."""
    words = ["rain", "Regen", "snow", "Schnee", "salt", "Salz", "bread", "Brot"]
    draw = np.random.default_rng(3)
    lines = [
        {"id": f"t{row}", "a": " ".join(draw.choice(words, 3)), "b": f"{row} {words[row % 8]}"} for row in range(13)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ids = [post.id for step in range(1, len(STEPS) + 1) for post in posts_of(step)]
    known = [post for number, post in enumerate(ids) if number % 3]
    scores = np.random.default_rng(4).random((len(known), 2))
    names = tuple(reversed(TAXONOMY.names))  # In an order of its own.
    unlabeled = np.full((len(known), 2), np.nan, np.float32)
    Predictions(names, known, ["de"] * len(known), scores, unlabeled).write(folder / "teacher.parquet")


def all_posts(step: int) -> list[EncodedSample]:
    """Those of the step with languages and disguises; no post of the last language in the first step."""
    posts = []
    for number, post in enumerate(posts_of(step)):
        language = LANGUAGES[number % 2 if step == 1 else number % 3]
        draw = np.random.default_rng(1000 * step + number)
        length = 0 if post.input_ids is None else len(post.input_ids) + 3
        posts.append(replace(post, language=language, disguised=draw.integers(3, 259, length).astype(np.int32)))
    return posts


def beside(config: Config) -> Beside:
    """What the terms read, from the files."""
    encode = PostEncoder(config.model, TAXONOMY)
    file = PairFile.open(config.train.alignment)
    return Beside(Teacher(config.train.distill, TAXONOMY.names), Translations(file, PAIRS, config.seed, encode), {})


def trained(config: Config, ranks: Ranks) -> tuple[Any, list[StepResult]]:
    """The real loop over all steps."""
    loop = loop_of(config, ranks, outspoken(config))
    loop.objective = open_objective(config, ranks, [SHARD], loop.state.group_weights)
    loop.engine.train()
    steps = range(1, len(STEPS) + 1)
    batches = (mine(ranks, all_posts(step), config) for step in steps)
    pairs = pairwise([*beside(config).attached(batches, 1, ranks), []])
    return loop, [loop.train_step(step, *pair) for step, pair in zip(steps, pairs, strict=True)]


def reference(config: Config) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The weights, and what each step says, of a bare loop: a pass for each view, every formula written down here."""
    model = outspoken(config).train()
    freeze(model, config.train.freeze)
    optimizer = build_optimizer(model, config.train)
    q = dict.fromkeys(LANGUAGES, 1 / 3)
    told = []
    alone = Ranks(0, 0, 1, torch.device("cpu"))
    wholes = beside(config).attached(([batch_of(*all_posts(step))] for step in range(1, len(STEPS) + 1)), 1, alone)
    for step, (whole,) in enumerate(wholes, start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.train, len(STEPS)) * group["lr_scale"]
        optimizer.zero_grad()
        terms, means, total = losses_of(model, whole, q)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip)
        optimizer.step()
        told.append(terms | {f"group_weight.{name}": weight for name, weight in q.items()})
        posts = {"de": 64, "sw": 9, "yo": 4}
        q = {
            name: q[name] * math.exp(0.4 * (means[name] + 1.5 / posts[name] ** 0.5)) if name in means else q[name]
            for name in q
        }
        q = {name: weight / sum(q.values()) for name, weight in q.items()}
    return copy_of(model), told


def losses_of(
    model: Classifier, whole: Batch, q: dict[str, float]
) -> tuple[dict[str, float], dict[str, float], Tensor]:
    """What a step says, the mean of each of its languages, and what is minimised."""
    assert whole.disguised_ids is not None
    assert whole.disguised_mask is not None
    assert whole.pair_ids is not None
    assert whole.pair_mask is not None
    assert whole.teacher is not None
    logits = model(whole)
    # Half a label on either side; spam: 21.5 of 69, insult: 6 of 54.
    rates = torch.tensor([22.0 / 70, 6.5 / 55])
    sizes = torch.tensor([[69 - 21.5, 54 - 6], [21.5, 6]])
    weights = sizes**-0.5 * 123 / (sizes**0.5).sum()
    labels, known = whole.labels.nan_to_num(0), ~whole.labels.isnan()
    cross = F.binary_cross_entropy_with_logits(logits + 0.7 * torch.log(rates / (1 - rates)), labels, reduction="none")
    cross = cross * (labels * weights[1] + (1 - labels) * weights[0]) * known
    means, robust, share = {}, torch.zeros(()), 0.0
    for name in q:
        rows = torch.tensor([language == name for language in whole.languages])
        if rows.any() and known[rows].any():
            mean = cross[rows].sum() / known[rows].sum()
            means[name], robust, share = float(mean.detach()), robust + q[name] * mean, share + q[name]
    robust = robust / share

    scored = ~whole.teacher.isnan()
    told = torch.distributions.Bernoulli(logits=torch.logit(whole.teacher[scored].double()) / 3)
    learned = torch.distributions.Bernoulli(logits=logits[scored].double() / 3)
    distill = 9 * torch.distributions.kl_divergence(told, learned).mean()

    others = model(replace(whole, input_ids=whole.disguised_ids, text_mask=whole.disguised_mask))
    one, other = (torch.distributions.Bernoulli(logits=part[whole.has_text].double()) for part in (logits, others))
    kl = torch.distributions.kl_divergence
    consistency = ((kl(one, other) + kl(other, one)) / 2).mean()

    units = [
        F.normalize(summary_of(model, row, mask), dim=0)
        for row, mask in zip(whole.pair_ids, whole.pair_mask, strict=True)
    ]
    scores = torch.stack(units[:PAIRS]) @ torch.stack(units[PAIRS:]).T / 0.2
    alignment = -(scores.diag() - scores.logsumexp(1) + scores.diag() - scores.logsumexp(0)).mean() / 2

    total = robust + 0.8 * distill + 0.6 * consistency + 0.3 * alignment
    parts = {"loss": cross.sum() / known.sum(), "loss.robust": robust, "loss.total": total}
    parts |= {"loss.distill": distill, "loss.consistency": consistency, "loss.alignment": alignment}
    return {name: float(value.detach()) for name, value in parts.items()}, means, total


def summary_of(model: Classifier, ids: Tensor, mask: Tensor) -> Tensor:
    """Of one text, without padding."""
    return model.text(ids[mask][None], mask[mask][None])[0].mean(0)


def main(folder: Path, output: Path) -> None:
    """Write, for each case, how far the loop is from the bare one."""
    ranks = init_ranks()
    ranks.on_first(lambda: write_files(folder))
    weights, told = reference(config_with_all_terms(folder, 0))
    found = {}
    for stage in range(4 if ranks.world_size > 1 else 1):
        for micro_batch_size in (POSTS, 2):
            config = config_with_all_terms(folder, stage, micro_batch_size=micro_batch_size)
            loop, results = trained(config, ranks)
            said = [{"loss": result.loss} | result.terms for result in results]
            assert [line.keys() for line in said] == [line.keys() for line in told]
            found[f"stage {stage}, micro-batches of {micro_batch_size}"] = {
                "weights": max(ranks.gather(largest_difference(loop.engine, weights))),
                "numbers": max(
                    apart(list(a.values()), [b[name] for name in a]) for a, b in zip(said, told, strict=True)
                ),
            }
            loop.engine.close()
    if ranks.is_first:
        output.write_text(json.dumps({"apart": found, "told": told}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    end_process(0)
