"""From the configuration to the objective, and to what its terms read beside the posts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from crossguard.configs.errors import UserError
from crossguard.configs.schema import Config
from crossguard.data.loading.collate import Batch
from crossguard.data.records import post_key
from crossguard.data.shards.labels import LabelCounts
from crossguard.data.shards.manifest import ShardInfo
from crossguard.data.taxonomy import Taxonomy
from crossguard.train.inputs import Inputs
from crossguard.train.objectives.alignment import Alignment
from crossguard.train.objectives.balance import label_weights, log_odds
from crossguard.train.objectives.consistency import Consistency
from crossguard.train.objectives.distillation import Distillation, Teacher
from crossguard.train.objectives.group_dro import GroupDro
from crossguard.train.objectives.labels import LabelLoss
from crossguard.train.objectives.losses import build_loss
from crossguard.train.objectives.objective import Objective
from crossguard.train.objectives.severity import Severity
from crossguard.train.objectives.term import Term
from crossguard.train.objectives.translations import PairFile, Translations
from crossguard.train.ranks import Ranks

T = TypeVar("T")


def open_objective(
    config: Config, ranks: Ranks, shards: Iterable[ShardInfo], group_weights: dict[str, float]
) -> Objective:
    """The objective of a configuration.

    Args:
        config: the recipe.
        ranks: all of them.
        shards: of the training split; their counts give weights, priors and languages.
        group_weights: of group DRO, as a checkpoint keeps them; changed in place.

    Raises:
        UserError: a loss of the user's own cannot be found.
    """
    train, loss = config.train, config.train.loss
    shards = tuple(shards)
    counts = LabelCounts.of_shards(shards, [policy.name for policy in config.taxonomy.policies])
    dro = GroupDro(loss.group_dro, _posts(shards), group_weights) if loss.group_dro.step_size else None
    labels = LabelLoss(
        build_loss(loss),
        len(config.taxonomy.policies),
        counts.languages,
        offsets=log_odds(loss.logit_adjustment, counts) if loss.logit_adjustment.tau else None,
        weights=label_weights(loss.balance, counts) if loss.balance.by else None,
        group_dro=dro,
    )
    terms: list[Term] = []
    taxonomy = Taxonomy.from_config(config.taxonomy)
    if taxonomy.severities and loss.severity_weight:
        terms.append(Severity(taxonomy, loss.severity_weight))
    if train.distill.predictions is not None and train.distill.weight:
        terms.append(Distillation(train.distill))
    if train.consistency.weight:
        terms.append(Consistency(train.consistency.weight))
    if train.alignment.pairs is not None:
        terms.append(Alignment(train.alignment, ranks))
    return Objective(labels, terms, views=bool(train.consistency.weight) or train.alignment.pairs is not None)


@dataclass(frozen=True)
class Beside:
    """What the objective reads beside the posts of a step: a teacher's scores, pairs of translations."""

    teacher: Teacher | None
    translations: Translations | None
    # Key of the configuration -> SHA-256 of the file that it names; kept in every checkpoint.
    files: dict[str, str]

    @classmethod
    def open(cls, config: Config, ranks: Ranks, inputs: Inputs, saved: Mapping[str, str] | None) -> Beside:
        """Open the files; all ranks call it.

        Args:
            config: the recipe.
            ranks: all of them.
            inputs: the posts.
            saved: `files` of the checkpoint that training goes on from.

        Raises:
            UserError: a file is missing or wrong, or not that of the checkpoint, or the teacher knows no training post.
        """
        distill, alignment = config.train.distill, config.train.alignment
        files, teacher, translations = {}, None, None
        if distill.predictions is not None:
            key, path = "train.distill.predictions", Path(distill.predictions)
            policies = inputs.encode.taxonomy.names
            teacher = _agreed(ranks, lambda: Teacher(distill, policies))
            files[key] = _agreed(ranks, lambda: hashlib.sha256(path.read_bytes()).hexdigest())
            ranks.on_first(lambda: _check_known(teacher, f"{key}={path}", inputs, ranks))
        if alignment.pairs is not None:
            pairs = _agreed(ranks, lambda: PairFile.open(alignment))
            files["train.alignment.pairs"] = pairs.sha256
            translations = Translations(pairs, alignment.batch_size, config.seed, inputs.encode)
        if any(other != files for other in ranks.gather(files)):
            raise UserError(f"{', '.join(files)}: the ranks find different files under the same name")
        for key in sorted(files.keys() | (saved or {}).keys()):
            if saved is not None and saved.get(key) != files.get(key):
                raise UserError(
                    f"{key}: not the file that the checkpoint was trained with; restore it, choose another run_dir, or"
                    " begin anew with train.restart=true"
                )
        return cls(teacher, translations, files)

    def attached(self, loader: Iterable[list[Batch]], first_step: int, ranks: Ranks) -> Iterator[list[Batch]]:
        """The steps of `loader`, from `first_step` on, with what belongs to them."""
        for step, batches in enumerate(loader, start=first_step):
            if self.teacher is not None:
                batches = [self.teacher.attach(batch) for batch in batches]
            if self.translations is not None:
                batches = [self.translations.attach(batches[0], step, ranks), *batches[1:]]
            yield batches


def _agreed(ranks: Ranks, act: Callable[[], T]) -> T:
    """What every rank does for itself; the error of any of them is everyone's."""
    result: Any = None
    error: Exception | None = None
    try:
        result = act()
    except (UserError, OSError) as failed:
        error = failed
    ranks.agree(error)
    return result


def _check_known(teacher: Teacher | None, key: str, inputs: Inputs, ranks: Ranks) -> None:
    """Say how many of the training posts the teacher knows."""
    assert teacher is not None
    keys = np.array([np.bytes_(post_key(post)) for post in teacher.ids], dtype=inputs.reader.column("key").dtype)
    known = int(np.isin(inputs.reader.column("key"), keys).sum())
    if not known:
        raise UserError(f"{key}: has the score of none of the {len(inputs.reader)} training posts; predict those")
    ranks.say(f"train: the teacher has scored {known} of the {len(inputs.reader)} training posts")


def _posts(shards: Iterable[ShardInfo]) -> dict[str, int]:
    """Language -> posts."""
    counts: Counter[str] = Counter()
    for shard in shards:
        for name, number in shard.strata.items():
            counts[name.rpartition("/")[0]] += number
    return dict(sorted(counts.items()))
