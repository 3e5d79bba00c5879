"""Evasion: disguised texts are read as what they say, honest texts in any language stay, and training meets disguises."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TAXONOMY, model_config

from crossguard.configs.errors import UserError
from crossguard.configs.schema.encoders import NORMALISERS, TextEncoderConfig
from crossguard.configs.schema.train import ATTACKS, TextAttacksConfig
from crossguard.data.curation.attacks import FAMILIES, TextAttacks, attack
from crossguard.data.curation.normalise import VERSION, normalise
from crossguard.data.loading.sample import RawSample
from crossguard.train.encode import PostEncoder

HONEST = [
    "McDonald and YouTube on my iPhone, at 10:30 for $5 or 1.000.000 dong",
    "covid19 and mp3 players, 3d prints, 4ever, @user1 and b4",
    "see https://example.com/aBcDeF/h.a.t.e/a1b2 or www.example.com/LoL",
    "người Việt Nam ở Đà Nẵng",
    "ẹ́kọ́ Yorùbá àti Èdè Gẹ̀ẹ́sì",
    "źdźbło, zażółć gęślą jaźń, příliš žluťoučký kůň",
    "Привет как дела у тебя",
    "Ελλάδα και Κύπρος",
    "नमस्ते दुनिया",
    "오늘 날씨가 좋다",
    "今天天气很好",
    "سلام دنيا",
    "ɖe asi ɖe eŋu, ɣeyiɣi",
    "šíří se těší čím dál",
    "KKK, World War III and VIII, xxx",
    "4x4 or 1v1 at 5pm!",
    "ẹ̀ṣọ́ m̀bá ńlá",
    "哈哈 北京、上海",
]
DISGUISED = {
    "h\u0430te sp\u0435ech": "hate speech",
    "\u0441\u043e\u0440 here in town": "cop here in town",
    "привет x\u006fpошо мир": "привет хорошо мир",
    "h.a.t.e and k-i-l-l": "hate and kill",
    "they h a t e it": "they hate it",
    "hAtE tHeM": "hate them",
    "sh1t a55hole 5h0uld": "shit asshole should",
    "ｆｕｌｌ 𝐛𝐨𝐥𝐝 ⓗⓘⓣ": "full bold hit",
    "ni\u200bce w\u00ado\u2060rd": "nice word",
    "h\u0336a\u0336t\u0336e\u0336": "hate",
    "noooooo!!!!!!!": "no!!!",
    "5h17 n080dy m€$$@ge sh1t!": "shit nobody message shit!",
    "t\u0303h\u0308e\u0331y\u0301 h\u0308ă\u0331t\u0303e\u0323": "they hăte",
    "n\u0303g\u0303ư\u0308ờ\u0303i\u0301": "người",
    "시.발.놈": "시발놈",
    "오̃늘̈": "오늘",
    "\u0441\u043e\u0440\u0455 हम": "\u0441\u043e\u0440\u0455 हम",
    "\u0455top हम": "stop हम",
}


@pytest.mark.parametrize("text", HONEST)
def test_honest_texts_stay(text: str) -> None:
    assert normalise(text) == text


@pytest.mark.parametrize("text", DISGUISED)
def test_disguises_are_undone(text: str) -> None:
    assert normalise(text) == DISGUISED[text]


@settings(max_examples=300)
@given(
    st.text(alphabet=st.characters(exclude_categories=["Cs"]))
    | st.text(alphabet="aAbеО0134@$.-_ \u0301\u0336\u200bsSiI!")
)
def test_doing_it_twice_changes_nothing_more(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_the_configuration_knows_what_there_is() -> None:
    assert NORMALISERS == (0, VERSION)
    assert tuple(FAMILIES) == ATTACKS
    with pytest.raises(UserError, match=r"model\.text\.normaliser=7: one of 0, 2"):
        TextEncoderConfig(normaliser=7)
    with pytest.raises(UserError, match="did you mean 'leetspeak'"):
        TextAttacksConfig(families=["leetspeek"])


WORDS = ["people", "nobody", "listen", "stupid", "should", "never", "river", "tomorrow", "phone", "message"]


@pytest.mark.parametrize("family", ATTACKS)
def test_an_attack_changes_half_of_the_words_the_same_way_for_the_same_seed(family: str) -> None:
    texts = [" ".join(random.Random(number).choices(WORDS, k=12)) for number in range(200)]
    disguised = [attack(text, family, f"{number}") for number, text in enumerate(texts)]
    assert disguised == [attack(text, family, f"{number}") for number, text in enumerate(texts)]
    pairs = [
        (old, new)
        for text, other in zip(texts, disguised, strict=True)
        for old, new in zip(text.split(), other.split(), strict=True)
    ]
    assert 0.35 < sum(old != new for old, new in pairs) / len(pairs) < 0.6
    changed = [
        (old, new)
        for original, text in zip(texts, disguised, strict=True)
        for old, raw, new in zip(original.split(), text.split(), normalise(text).split(), strict=True)
        if raw != old
    ]
    undone = sum(old == new for old, new in changed) / len(changed)
    # What is left to training: ambiguous signs, doubled letters, and all swaps.
    least, most = {"leetspeak": (0.9, 0.99), "repetition": (0.9, 0.99), "swaps": (0, 0)}.get(family, (0.97, 1))
    assert least <= undone <= most


def test_training_meets_disguises_by_position_alone() -> None:
    config = model_config()
    raw = RawSample({"id": "p", "labels": {}}, text="people should never listen to nobody")
    plain = PostEncoder(config, TAXONOMY)
    trained = PostEncoder(config, TAXONOMY, attacks=TextAttacks(0.5, ATTACKS, seed=3))
    texts = [bytes(trained(raw, position).input_ids.tolist()) for position in range(200)]
    unchanged = bytes(plain(raw).input_ids.tolist())
    assert 0.35 < sum(text != unchanged for text in texts) / len(texts) < 0.65
    assert len(set(texts)) > 60
    again = PostEncoder(config, TAXONOMY, attacks=TextAttacks(0.5, ATTACKS, seed=3))
    assert [bytes(again(raw, position).input_ids.tolist()) for position in range(200)] == texts
    assert bytes(trained(raw).input_ids.tolist()) == unchanged  # outside training
    other = PostEncoder(config, TAXONOMY, attacks=TextAttacks(0.5, ATTACKS, seed=4))
    assert [bytes(other(raw, position).input_ids.tolist()) for position in range(200)] != texts


def test_a_post_may_have_one_disguise_wherever_it_comes() -> None:
    once = PostEncoder(model_config(), TAXONOMY, attacks=TextAttacks(0.5, ATTACKS, seed="3", once=True))
    said = "people should never listen to nobody"
    texts = []
    for number in range(200):
        raw = RawSample({"id": f"p{number}", "labels": {}}, text=said)
        first, second, outside = (bytes(once(raw, position).input_ids.tolist()) for position in (0, 1000 - number, -1))
        assert first == second
        texts.append(first)
    assert 0.35 < sum(text != outside for text in texts) / len(texts) < 0.65
    assert len(set(texts)) > 60


def test_the_normaliser_is_part_of_the_encoding() -> None:
    config = model_config()
    plain = PostEncoder(config, TAXONOMY)
    config.text.normaliser = VERSION
    normalising = PostEncoder(config, TAXONOMY)
    disguised, said = (RawSample({"id": "p", "labels": {}}, text=text) for text in ("h\u0430.te\u200b", "ha.te"))
    assert normalising(disguised).input_ids.tolist() == plain(said).input_ids.tolist()
    assert normalising.text_length(disguised) == len(plain(said).input_ids)
    assert normalising.fingerprint != plain.fingerprint
