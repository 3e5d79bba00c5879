"""Undoing the disguises in which texts slip past a classifier, the same way in training, evaluation and serving.

In this order: invisible characters, marks piled on letters, compatibility forms (Unicode's NFKC), letters of another
script, alternating case, letters set apart, symbols in place of letters, repetition. What a language needs stays: a
letter's own marks, words in any script, initial capitals. Two things go that some need: joiners, which shape letters,
are invisible; and a letter written three times is written once, as in loooong, also where that is right (Schifffahrt).
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter

from crossguard.data.curation.lookalikes import INTO, LATIN, TO_LATIN, script_of

# Raise it whenever any text comes out otherwise: models remember with which version they were trained.
VERSION = 2

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
_MARKED_WORD = re.compile(rf"(?:[^\W\d_]{_MARKS}*){{2,}}")
# Scripts whose letters may carry such marks; those of the others have marks of their own.
_MARKABLE = (LATIN, "CYRILLIC", "GREEK", "COPTIC", "GLAGOLITIC", "CHEROKEE", "SYRIAC")
# What may be of a script that looks like another one: Greek to Armenian, Cherokee, and single letters.
_FOREIGN = re.compile(f"[\u0370-\u058f\u13a0-\u13ff\uab70-\uabbf{''.join(TO_LATIN)}]")
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
_LATIN_LETTER = "[A-Za-z\u00c0-\u024f\u1e00-\u1eff]"
_TOKEN = re.compile(r"\S+")
_LINK = re.compile(r"((?:https?://|www\.)\S+)")
_LOWER_BEFORE_UPPER = re.compile("[a-zß-öø-ÿα-ωа-я][A-ZÀ-ÖØ-ÞΑ-ΩА-Я]")
# Three digits at most: what is longer is a number.
_SIGNS_INSIDE = re.compile(rf"(?<={_LATIN_LETTER})(?:{_SIGN}{{1,3}}|(?=\d*[@$!€]){_SIGN}{{4,5}})(?={_LATIN_LETTER})")
# A word does not begin with @, which names somebody, nor end with !
_SIGNS_BEFORE = re.compile(rf"^(?!@){_SIGN}{{1,3}}(?={_LATIN_LETTER})")
_SIGNS_AFTER = re.compile(rf"(?<={_LATIN_LETTER})[{re.escape(''.join(_LEET).replace('!', ''))}]{{1,3}}(?=[!?.,;:]*$)")
_SIGNS = re.compile(rf"{_LATIN_LETTER}{_SIGN}|{_SIGN}{_LATIN_LETTER}")
# 4x4 and 1v1.
_BY = re.compile(r"\d+[xv]\d+[!?.,;:]*", re.IGNORECASE)
_REPEATED = re.compile(rf"({_LETTER})\1\1")
# Roman numbers, words of one letter (KKK, www), letters in a word.
_RUN = re.compile(rf"(?<!\w)[IVXLCDM]+(?!\w)|(?P<whole>(?<!\w)({_LETTER})\2{{2,}}(?!\w))|({_LETTER})\3{{2,}}")
_REPEATED_SIGNS = re.compile(r"([^\w\s])\1{3,}")


def normalise(text: str) -> str:
    """The text without disguises; doing it twice changes nothing more.

    Some 20 to 200 µs of an idle core for a post of 100 characters, the most where much is disguised.

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
        text = _without_piled_marks(_INVISIBLE.sub("", text))
        # What the compatibility forms stand for may be invisible again. One mark is left that no letter contains.
        text = _PILED.sub(r"\1", _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)))
        text = _in_one_script(text)
    # Links are no words.
    return "".join(part if _LINK.match(part) else _spelled_plainly(part) for part in _LINK.split(text))


def _spelled_plainly(text: str) -> str:
    if _LOWER_BEFORE_UPPER.search(text):
        text = _WORD.sub(_in_one_case, text)
    text = _SPACED.sub(_joined, _APART.sub(_letters_of, text))
    if _SIGNS.search(text):
        text = _TOKEN.sub(_in_letters, text)
    if _REPEATED.search(text):
        text = _RUN.sub(_shortened, text)
    return _REPEATED_SIGNS.sub(r"\1\1\1", text)


def _without_piled_marks(text: str) -> str:
    """None on letters whose scripts have none, nor on words whose consonants carry them, as nobody writes."""
    text = _OVERLAYS.sub("", text)
    if not _MARK.search(text):
        return text
    return _MARKED_WORD.sub(_without_marks, _LETTER_AND_MARKS.sub(_of_its_script, text))


def _of_its_script(found: re.Match[str]) -> str:
    return found[0] if script_of(found[1]) in _MARKABLE else found[1]


def _without_marks(found: re.Match[str]) -> str:
    word = found[0]
    # Marks that no letter contains show a disguise; those that one does may belong to it.
    letters = [
        (unicodedata.normalize("NFD", letter)[0].lower(), letter, bool(marks))
        for letter, marks in _LETTER_AND_MARKS.findall(unicodedata.normalize("NFC", word))
    ]
    marked = [marks or base != letter.lower() for base, letter, marks in letters]
    consonants = [number for number, (base, _, _) in enumerate(letters) if base not in _VOWELS]
    strange = any(letters[number][2] for number in consonants)
    if (
        strange
        and 2 * sum(marked[number] for number in consonants) > len(consonants)
        and sum(marked) > 0.6 * len(marked)
    ):
        # A letter of its own stays, unless somebody has composed all that could be.
        own = unicodedata.normalize("NFD", word) if unicodedata.is_normalized("NFC", word) else word
        return _MARK.sub("", own)
    return word


def _in_one_script(text: str) -> str:
    """Each word in the script of most of its letters, where the others look like letters of it."""
    if not _FOREIGN.search(text):
        return text
    scripts = Counter(map(script_of, text))
    del scripts[""]
    usual = scripts.most_common(1)[0][0]

    def convert(found: re.Match[str]) -> str:
        word = found[0]
        mine = Counter(map(script_of, word))
        for script in (usual, *(name for name, _ in sorted(mine.items(), key=lambda one: (one[0] != LATIN, -one[1])))):
            table = INTO.get(script, {})
            # A word of which a letter has no look-alike there is of another script.
            if all(letter in table or script_of(letter) == script for letter in word):
                return "".join(table.get(letter, letter) for letter in word)
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
    """5h0uld -> should, 5h17 -> shit, but 3d, 4ever, b4 and 4x4 stay: signs are letters inside, or on both sides."""
    token = found[0]
    on_both_sides = _SIGNS_BEFORE.search(token) and _SIGNS_AFTER.search(token) and not _BY.fullmatch(token)
    if on_both_sides or _SIGNS_INSIDE.search(token):
        for signs in (_SIGNS_INSIDE, _SIGNS_BEFORE, _SIGNS_AFTER):
            token = signs.sub(_decoded, token)
    return token


def _decoded(found: re.Match[str]) -> str:
    return "".join(_LEET[sign] for sign in found[0])


def _shortened(found: re.Match[str]) -> str:
    if found["whole"]:
        return found["whole"][:3]
    return found[3] or found[0]


def _letters_of(found: re.Match[str]) -> str:
    return "".join(letter for letter in found[0] if letter.isalpha())


def _joined(found: re.Match[str]) -> str:
    letters = _letters_of(found)
    return letters if all(script_of(letter) in _SPELLED for letter in letters) else found[0]
