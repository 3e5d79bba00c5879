"""The disguises that `normalise` undoes, and two that it cannot: for training and for measuring against them.

Each family is a function of a text and a generator; it changes about half of the words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from crossguard.data.curation.lookalikes import INTO, LATIN, script_of

_WORD = re.compile(r"[^\W\d_]{2,}")
SHARE_OF_WORDS = 0.5
_ZERO_WIDTH = "\u200b\u200c\u2060\ufeff"
_MARKS = "\u0301\u0303\u0308\u0323\u0331\u0336\u0347"
_LEET = {"a": "4@", "e": "3€", "i": "1!", "o": "0", "s": "5$", "t": "7", "b": "8"}
_SEPARATORS = ".-_*"


def leetspeak(word: str, draw: random.Random) -> str:
    """Digits and symbols in place of letters: h4te."""
    return "".join(draw.choice(_LEET[low]) if (low := letter.lower()) in _LEET else letter for letter in word)


def homoglyphs(word: str, draw: random.Random) -> str:
    """Letters of another script that look the same: hаte."""
    script = script_of(word[0])
    into = INTO["CYRILLIC"] if script == LATIN else INTO[LATIN]
    return "".join(into[letter] if letter in into and draw.random() < 0.7 else letter for letter in word)


def zero_width(word: str, draw: random.Random) -> str:
    """Invisible characters between letters."""
    return "".join(letter + draw.choice(_ZERO_WIDTH) for letter in word[:-1]) + word[-1]


def repetition(word: str, draw: random.Random) -> str:
    """One letter many times: haaaate."""
    place = draw.randrange(len(word))
    return word[:place] + word[place] * draw.randint(3, 6) + word[place + 1 :]


def separation(word: str, draw: random.Random) -> str:
    """Letters set apart: h.a.t.e."""
    return draw.choice(_SEPARATORS).join(word)


def marks(word: str, draw: random.Random) -> str:
    """Marks piled on letters."""
    return "".join(letter + "".join(draw.choices(_MARKS, k=draw.randint(1, 3))) for letter in word)


def compatibility_forms(word: str, draw: random.Random) -> str:
    """Full-width, bold or circled letters in place of plain ones."""
    base = draw.choice((0xFF21, 0x1D400, 0x24B6))
    capitals, small = base, base + (32 if base == 0xFF21 else 26)
    changed = []
    for letter in word:
        if "A" <= letter <= "Z":
            letter = chr(capitals + ord(letter) - ord("A"))
        elif "a" <= letter <= "z":
            letter = chr(small + ord(letter) - ord("a"))
        changed.append(letter)
    return "".join(changed)


def swaps(word: str, draw: random.Random) -> str:
    """Two letters inside a word change places: haet."""
    if len(word) < 4:
        return word
    place = draw.randrange(1, len(word) - 2)
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


FAMILIES: dict[str, Callable[[str, random.Random], str]] = {
    function.__name__: function
    for function in (
        leetspeak,
        homoglyphs,
        zero_width,
        repetition,
        separation,
        marks,
        compatibility_forms,
        swaps,
    )
}


@dataclass(frozen=True)
class TextAttacks:
    """Texts as evaders would write them, a share of those that are trained on; sent to the processes that read."""

    # Share of the texts.
    probability: float
    # Names of FAMILIES, one of which is drawn for each text.
    families: tuple[str, ...]
    # What is drawn follows from it and the post's place.
    seed: str
    # Whether that is its id, which is the same whenever the post comes, or its position in the sample order.
    once: bool = False

    def apply(self, text: str, place: int | str, field: str = "") -> str:
        """The text, or its disguise: a function of the seed, the post's place and the name of its field alone."""
        name = f"{self.seed}/{place}{field and f'/{field}'}"
        draw = random.Random(name)
        if draw.random() >= self.probability:
            return text
        return attack(text, draw.choice(self.families), f"{name}/words")


def attack(text: str, family: str, seed: str) -> str:
    """The text as an evader would write it: about half of its words changed.

    Args:
        text: of a post.
        family: one of FAMILIES.
        seed: the same one gives the same text.
    """
    draw = random.Random(seed)
    change = FAMILIES[family]
    return _WORD.sub(lambda found: change(found[0], draw) if draw.random() < SHARE_OF_WORDS else found[0], text)
