"""Posts as evaders would write them, for scoring a split once more."""

from __future__ import annotations

from dataclasses import dataclass, replace

from crossguard.data.curation.attacks import attack
from crossguard.data.loading.sample import RawSample
from crossguard.train.encode import TRANSCRIPT


@dataclass(frozen=True)
class Disguise:
    """A change to the texts of a post: a function of the seed, the family and the post's id alone.

    What is spoken stays as it is. Sent to the processes that read.
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
