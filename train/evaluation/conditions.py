"""Conditions under which a split is scored again: the same posts, each changed before it is encoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from crossguard.configs.schema import Config
from crossguard.data.curation.attacks import attack
from crossguard.data.loading.sample import RawSample
from crossguard.train.encode import TRANSCRIPT
from crossguard.train.evaluation.predictions import Predictions

# The kind of a condition.
DISGUISED = "disguised"
# Kind -> name -> predictions.
UnderConditions = Mapping[str, Mapping[str, Predictions]]


@dataclass(frozen=True)
class Condition:
    """A change to posts. Labels stay as they are."""

    kind: str
    name: str
    # Sent to the processes that read.
    change: Callable[[RawSample], RawSample]


@dataclass(frozen=True)
class Disguise:
    """Texts as an evader would write them: a function of the seed, the family and the post's id alone.

    What is spoken stays as it is.
    """

    family: str
    seed: int

    def __call__(self, raw: RawSample) -> RawSample:
        texts = {
            name: value if name == TRANSCRIPT else self._texts(raw, name, value) for name, value in raw.texts.items()
        }
        return replace(raw, text=None if raw.text is None else self._text(raw, "", raw.text), texts=texts)

    def _texts(self, raw: RawSample, name: str, value: str | list[str]) -> str | list[str]:
        if isinstance(value, str):
            return self._text(raw, name, value)
        return [self._text(raw, f"{name}/{number}", text) for number, text in enumerate(value)]

    def _text(self, raw: RawSample, name: str, text: str) -> str:
        return attack(text, self.family, f"{self.seed}/{self.family}/{raw.id}/{name}")


def conditions_of(config: Config) -> list[Condition]:
    """What the configuration asks for."""
    return [Condition(DISGUISED, family, Disguise(family, config.seed)) for family in config.evaluation.attacks]
