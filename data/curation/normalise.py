"""Undoing the disguises in which texts slip past a classifier, the same way in training, evaluation and serving.

In this order: compatibility forms (Unicode's NFKC), invisible characters, marks piled on letters, letters of another
script, alternating case, letters set apart, symbols in place of letters, repetition. What a language needs stays: a
letter's own marks, words in any script, initial capitals. Joiners, which some scripts use to shape letters, are
invisible and go.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter

from crossguard.data.curation.lookalikes import INTO, LATIN, script_of

# Raise it whenever any text comes out otherwise: models remember with which version they were trained.
VERSION = 1

# Format characters, variation selectors, fillers that show nothing; not line breaks and tabs.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff"
    "\uffa0\ufff9-\ufffb\U000e0000-\U000e01ef]"
)
# Strokes through letters and frames around them, which no orthography writes.
_OVERLAYS = re.compile("[\u0334-\u0338\u20d0-\u20f0]")
_MARKS = "[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff]"
_PILED = re.compile(f"({_MARKS}){_MARKS}+")
_MARK = re.compile(_MARKS)
_LETTER_AND_MARKS = re.compile(rf"([^\W\d_])({_MARKS}*)")
_MARKED_WORD = re.compile(rf"(?:[^\W\d_]{_MARKS}*){{3,}}")
_WORD = re.compile(r"[^\W\d_]+")
_MOST_ROUNDS = 5
_LETTER = r"[^\W\d_]"
# h.a.t.e and h-a-t-e; h a t e only from four letters on.
_APART = re.compile(rf"(?<!\w){_LETTER}(?:([.\-_*·•|/\\,~+]){_LETTER})(?:\1{_LETTER})+(?!\w)")
_SPACED = re.compile(rf"(?<!\w){_LETTER}(?: {_LETTER}){{3,}}(?!\w)")
_VOWELS = "aeiouyаеиоуыэюяαεηιουω"
# Scripts whose words have several letters: there, a letter for itself is set apart.
_SPELLED = ("LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "ARABIC", "HEBREW")
_LEET = {"0": "o", "1": "i", "3": "e", "4": "a", "5": "s", "7": "t", "8": "b", "@": "a", "$": "s", "!": "i", "€": "e"}
_SIGN = f"[{re.escape(''.join(_LEET))}]"
_TOKEN = re.compile(r"\S+")
_LINK = re.compile(r"((?:https?://|www\.)\S+)")
_LOWER_BEFORE_UPPER = re.compile("[a-zß-öø-ÿα-ωа-я][A-ZÀ-ÖØ-ÞΑ-ΩА-Я]")
# Between letters, two at most: what is longer is a number.
_SIGNS_INSIDE = re.compile(rf"(?<=[A-Za-z]){_SIGN}{{1,2}}(?=[A-Za-z])")
_SIGN_AT_EDGE = re.compile(rf"^{_SIGN}(?=[A-Za-z])|(?<=[A-Za-z]){_SIGN}$")
_REPEATED = re.compile(rf"({_LETTER})\1{{2,}}")
_REPEATED_SIGNS = re.compile(r"([^\w\s])\1{3,}")


def normalise(text: str) -> str:
    """The text without disguises; doing it twice changes nothing more. Some 20 to 200 µs for a post of 100 characters.

    Unicode: NFKC of UAX 15, look-alikes of UTS 39.
    """
    # One step may uncover what another one undoes: letters that come together, once more.
    for _ in range(_MOST_ROUNDS):
        before, text = text, _once(text)
        if text == before:
            break
    return text


def _once(text: str) -> str:
    if not text.isascii():
        # What the compatibility forms stand for may be invisible again.
        text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)))
        text = _in_one_script(_without_piled_marks(text))
    # Links are no words.
    return "".join(part if _LINK.match(part) else _spelled_plainly(part) for part in _LINK.split(text))


def _spelled_plainly(text: str) -> str:
    if _LOWER_BEFORE_UPPER.search(text):
        text = _WORD.sub(_in_one_case, text)
    text = _SPACED.sub(_joined, _APART.sub(_joined, text))
    if _SIGNS_INSIDE.search(text):
        text = _TOKEN.sub(_in_letters, text)
    return _REPEATED_SIGNS.sub(r"\1\1\1", _REPEATED.sub(r"\1\1", text))


def _without_piled_marks(text: str) -> str:
    """At most one mark that no letter contains, and none on words whose consonants carry them, as nobody writes."""
    text = unicodedata.normalize("NFC", _PILED.sub(r"\1", _OVERLAYS.sub("", text)))
    return _MARKED_WORD.sub(_without_marks, text) if _MARK.search(unicodedata.normalize("NFD", text)) else text


def _without_marks(found: re.Match[str]) -> str:
    letters = _LETTER_AND_MARKS.findall(unicodedata.normalize("NFD", found[0]))
    consonants = [bool(marks) for letter, marks in letters if letter.lower() not in _VOWELS]
    marked = sum(bool(marks) for _, marks in letters)
    if consonants and 2 * sum(consonants) > len(consonants) and marked > 0.6 * len(letters):
        return "".join(letter for letter, _ in letters)
    return found[0]


def _in_one_script(text: str) -> str:
    """Each word in the script of most of its letters, where the others look like letters of it."""
    scripts = Counter(map(script_of, text))
    del scripts[""]
    if not scripts.keys() - {LATIN} or not scripts.keys() & INTO.keys():
        return text
    usual = scripts.most_common(1)[0][0]

    def convert(found: re.Match[str]) -> str:
        word = found[0]
        mine = Counter(map(script_of, word))
        for script in (usual, *(name for name, _ in mine.most_common())):
            table = INTO.get(script, {})
            # A word of which a letter has no look-alike there is of another script.
            if all(letter in table or script_of(letter) == script for letter in word):
                return "".join(letter if script_of(letter) == script else table[letter] for letter in word)
        return word

    return _WORD.sub(convert, text)


def _in_one_case(found: re.Match[str]) -> str:
    """hAtE -> hate; McDonald and YouTube stay."""
    word = found[0]
    if word.islower() or word.isupper() or len(word) < 4:
        return word
    upper = [letter.isupper() for letter in word]
    changes = sum(one != other for one, other in itertools.pairwise(upper))
    return word.lower() if changes >= 3 and changes > len(word) / 2 else word


def _in_letters(found: re.Match[str]) -> str:
    """5h0uld -> should, but 3d and 4ever stay: only what has a sign inside has letters for those at its edges."""
    token = found[0]
    if not _SIGNS_INSIDE.search(token):
        return token
    for signs in (_SIGNS_INSIDE, _SIGN_AT_EDGE):
        token = signs.sub(lambda run: "".join(_LEET[sign] for sign in run[0]), token)
    return token


def _joined(found: re.Match[str]) -> str:
    letters = [letter for letter in found[0] if letter.isalpha()]
    return "".join(letters) if all(script_of(letter) in _SPELLED for letter in letters) else found[0]
