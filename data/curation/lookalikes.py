"""Letters of other scripts that look like Latin ones, of Unicode's table of confusables (UTS 39), and back again.

Left out are letters that Unicode's compatibility forms replace already, and Latin letters of living alphabets (ɣ and ʋ
of Ewe), which are no disguise there.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

_OF_LATIN = {
    "a": "ɑαа",
    "b": "ЬᏏ",
    "c": "сᴄꮯ",
    "d": "ԁᏧ",
    "e": "еҽ",
    "f": "ք",
    "g": "ɡց",
    "h": "һհᏂ",
    "i": "ɪιіӏᎥꙇꭵ",
    "j": "ϳј",
    "l": "ΙІӀ",
    "n": "ոռ",
    "o": "οоσօᴏᴑ",
    "p": "ρр",
    "q": "ԛգզ",
    "r": "гᴦꮁ",
    "s": "ѕꮪ",
    "u": "υսᴜ",
    "v": "νѵᴠꮩ",
    "w": "ɯѡԝաᴡꮃ",
    "x": "х",
    "y": "уγʏү",
    "z": "ᴢꮓ",
    "A": "ΑАᎪ",
    "B": "ΒВᏴ",
    "C": "СᏟ",
    "D": "Ꭰ",
    "E": "ΕЕᎬ",
    "F": "Ϝ",
    "G": "ԌᏀᏳ",
    "H": "ΗНᎻ",
    "J": "ͿЈᎫ",
    "K": "ΚКᏦ",
    "L": "Ꮮ",
    "M": "ΜМϺᎷ",
    "N": "Ν",
    "O": "ΟОՕ",
    "P": "ΡРᏢ",
    "R": "ᎡᏒ",
    "S": "ЅՏᏕᏚ",
    "T": "ΤТᎢ",
    "U": "Ս",
    "V": "ѴᏙ",
    "W": "ԜᎳᏔ",
    "X": "ΧХ",
    "Y": "ΥУҮᎩᎽ",
    "Z": "ΖᏃ",
}
LATIN = "LATIN"
TO_LATIN = {letter: latin for latin, letters in _OF_LATIN.items() for letter in letters}


@lru_cache(maxsize=1 << 14)
def script_of(character: str) -> str:
    """The script of a letter, as its Unicode name begins ("LATIN", "CYRILLIC"); "" of all that is no letter."""
    if not character.isalpha():
        return ""
    return unicodedata.name(character, "").partition(" ")[0]


def _into() -> dict[str, dict[str, str]]:
    """Script -> letter -> the letter of that script that looks like it."""
    tables: dict[str, dict[str, str]] = {LATIN: dict(TO_LATIN)}
    for letter, latin in TO_LATIN.items():
        # The first of several is the most common one.
        if (script := script_of(letter)) != LATIN:
            tables.setdefault(script, {}).setdefault(latin, letter)
    return {script: tables[script] for script in (LATIN, "CYRILLIC", "GREEK", "ARMENIAN")}


INTO = _into()
