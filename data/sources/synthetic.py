"""The quickstart's posts: a generated confounder set, so that the whole job runs without data, hub or account.

Its violations are harmless stand-ins. A market stall announces the weather and its fruit; the picture shows both:

- `false_forecast`: the text promises one weather and the picture shows the other;
- `false_offer`: the text offers one fruit and the picture shows the other.

Posts come in *quadruples* of one language: two texts × two pictures, all four pairs posted, after the benign
confounders of Hateful Memes (arXiv 2005.04790). The two texts differ in both statements, and so do the two pictures,
so that for each policy every text stands in one violating and one benign post, and so does every picture: a model that
sees only one of them is at chance in every split and language, exactly. What such data proves is mechanisms, never
moderation quality.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any

from crossguard.configs.errors import UserError
from crossguard.configs.schema.data import DataConfig
from crossguard.data.sources.base import Record, check_settings
from crossguard.data.sources.synthetic_pictures import draw_stall
from crossguard.data.sources.synthetic_texts import LANGUAGES, PHRASES, UNSEEN_LANGUAGE, write_post
from crossguard.data.taxonomy import Taxonomy

POLICIES = ("false_forecast", "false_offer")
TRAIN = "train"
UNSEEN_SPLIT = "unseen_language"
# One quadruple in so many lacks the label of the first policy, and another one that of the second.
UNKNOWN_EVERY = 8
FIRST_DAY = datetime(2026, 1, 1, tzinfo=UTC)
# Raise it whenever the same options and seed give other posts than before.
GENERATOR_VERSION = 1


@dataclass(frozen=True)
class SyntheticOptions:
    """What `data.options` may say; posts in each split are rounded up to whole quadruples in every language."""

    train_posts: int = 5600
    validation_posts: int = 560
    test_posts: int = 1400
    unseen_posts: int = 400
    # Share of the training labels that are wrong; held-out labels never are.
    label_noise: float = 0.0


class SyntheticSource:
    """Generates the posts; the same options and seed give the same posts on every machine."""

    def __init__(self, config: DataConfig, taxonomy: Taxonomy, seed: int):
        """
        Raises:
            UserError: an option or a policy that the generator does not know.
        """
        unlabeled = [name for name in taxonomy.names if name not in POLICIES]
        if unlabeled:
            raise UserError(
                f"taxonomy.policies: data.source=synthetic has no labels for '{unlabeled[0]}'; "
                f"it labels {', '.join(POLICIES)}"
            )
        self.options = _read_options(config)
        self.policies = taxonomy.names
        self.seed = seed

    def records(self) -> Iterator[Record]:
        """Every post, its picture as bytes."""
        for split, languages, posts in self._plan():
            quadruples = -(-posts // (4 * len(languages)))
            for language in languages:
                for number in range(quadruples):
                    for post in self._quadruple(split, language, number):
                        yield Record(f"synthetic:{post['id']}", post)

    def fingerprint(self) -> str:
        """A hash of everything that decides the posts."""
        options = {name: value for name, value in asdict(self.options).items() if value}
        decides = {"version": GENERATOR_VERSION, "seed": self.seed, "policies": self.policies, **options}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def _plan(self) -> list[tuple[str, tuple[str, ...], int]]:
        options = self.options
        return [
            (TRAIN, LANGUAGES, options.train_posts),
            ("validation", LANGUAGES, options.validation_posts),
            ("test", LANGUAGES, options.test_posts),
            (UNSEEN_SPLIT, (UNSEEN_LANGUAGE,), options.unseen_posts),
        ]

    def _quadruple(self, split: str, language: str, number: int) -> Iterator[dict[str, Any]]:
        group = f"{split}-{language}-{number:05d}"
        rng = random.Random(f"{self.seed}/{group}")
        # Weather and fruit of the two texts, then of the two pictures: (0, x) and (1, 1 - x).
        stated = _opposites(rng)
        shown = _opposites(rng)
        texts = [write_post(language, *statement, rng) for statement in stated]
        pictures = [draw_stall(*scene, rng) for scene in shown]
        created_at = FIRST_DAY + timedelta(minutes=rng.randrange(90 * 24 * 60))
        for t in (0, 1):
            for p in (0, 1):
                violates = [float(said != seen) for said, seen in zip(stated[t], shown[p], strict=True)]
                id = f"{group}-{t}{p}"
                yield {
                    "id": id,
                    "text": texts[t],
                    "language": language,
                    "image": pictures[p],
                    "labels": self._labels(violates, number, id if split == TRAIN else None),
                    "split": split,
                    "group": group,
                    "created_at": created_at.isoformat().replace("+00:00", "Z"),
                    "source": "synthetic",
                    "licence": "CC0-1.0",
                    "region": PHRASES[language].region,
                    "consent": True,
                }

    def _labels(self, violates: list[float], number: int, noisy_id: str | None) -> dict[str, float | None]:
        """A whole quadruple loses a label, never a part of one: the balance stays exact.

        Args:
            violates: the truth, by policy.
            number: of the quadruple.
            noisy_id: of a post whose labels may be wrong; which ones are is a function of it.
        """
        labels: dict[str, float | None] = dict(zip(POLICIES, violates, strict=True))
        if noisy_id is not None and self.options.label_noise:
            for policy, label in zip(POLICIES, violates, strict=True):
                wrong = random.Random(f"{noisy_id}/{policy}").random() < self.options.label_noise
                labels[policy] = 1 - label if wrong else label
        turn = UNKNOWN_EVERY - 1 - number % UNKNOWN_EVERY
        if turn < len(POLICIES):
            labels[POLICIES[turn]] = None
        return {name: labels[name] for name in self.policies}


def _opposites(rng: random.Random) -> tuple[tuple[int, int], tuple[int, int]]:
    fruit = rng.randrange(2)
    return (0, fruit), (1, 1 - fruit)


def _read_options(config: DataConfig) -> SyntheticOptions:
    check_settings(config, options=tuple(option.name for option in fields(SyntheticOptions)))
    for name, value in config.options.items():
        if name == "label_noise":
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
                raise UserError(f"data.options.label_noise={value}: must be a number from 0 to 1")
        elif not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UserError(f"data.options.{name}={value}: must be a whole number, 0 or more")
    return SyntheticOptions(**config.options)
