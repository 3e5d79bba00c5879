"""What the generated posts say: short announcements of a market stall in several languages and scripts.

Each statement has a few wordings around one word that carries the meaning; the wording tells nothing about the label.
The words are chosen so that every wording is grammatical with either of them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Phrases:
    """One language's wordings; `{}` stands for the word that carries the meaning."""

    region: str
    # Sunshine, rain.
    weather: tuple[str, str]
    # Apples, grapes.
    fruit: tuple[str, str]
    forecasts: tuple[str, ...]
    offers: tuple[str, ...]


PHRASES = {
    "en": Phrases(
        region="US",
        weather=("sunshine", "rain"),
        fruit=("apples", "grapes"),
        forecasts=("Tomorrow: {}.", "We expect {}.", "More {} ahead."),
        offers=("We sell {}.", "Try our {}!", "Today: {}."),
    ),
    "de": Phrases(
        region="EU",
        weather=("Sonne", "Regen"),
        fruit=("Äpfel", "Trauben"),
        forecasts=("Morgen gibt es {}.", "Bald kommt {}.", "Wetter: {}."),
        offers=("Wir haben {}.", "Frische {}!", "Heute: {}."),
    ),
    "es": Phrases(
        region="EU",
        weather=("sol", "lluvia"),
        fruit=("manzanas", "uvas"),
        forecasts=("Mañana habrá {}.", "Pronto tendremos {}.", "Tiempo: {}."),
        offers=("Vendemos {}.", "¡Hay {}!", "Hoy: {}."),
    ),
    "ru": Phrases(
        region="RU",
        weather=("солнце", "дождь"),
        fruit=("яблоки", "виноград"),
        forecasts=("Завтра {}.", "Ждём {}.", "Погода: {}."),
        offers=("Продаём {}.", "Есть {}!", "Сегодня: {}."),
    ),
    "ar": Phrases(
        region="EG",
        weather=("الشمس", "المطر"),
        fruit=("التفاح", "العنب"),
        forecasts=("نتوقع {}.", "الطقس: {}.", "غدا: {}."),
        offers=("نبيع {}.", "لدينا {}!", "اليوم: {}."),
    ),
    "hi": Phrases(
        region="IN",
        weather=("धूप", "बारिश"),
        fruit=("सेब", "अंगूर"),
        forecasts=("कल {} होगी।", "मौसम: {}।", "अब {} आएगी।"),
        offers=("ताज़े {}!", "हमारे {} लें।", "आज: {}।"),
    ),
    "zh": Phrases(
        region="CN",
        weather=("晴天", "雨天"),
        fruit=("苹果", "葡萄"),
        forecasts=("明天是{}。", "天气：{}。", "将是{}。"),
        offers=("我们卖{}。", "有{}！", "今天：{}。"),
    ),
    "el": Phrases(
        region="EU",
        weather=("ήλιο", "βροχή"),
        fruit=("μήλα", "σταφύλια"),
        forecasts=("Αύριο {}.", "Περιμένουμε {}.", "Καιρός: {}."),
        offers=("Πουλάμε {}.", "Έχουμε {}!", "Σήμερα: {}."),
    ),
}
# Alone in a split of its own: neither its words nor its script occur anywhere else.
UNSEEN_LANGUAGE = "el"
LANGUAGES = tuple(language for language in PHRASES if language != UNSEEN_LANGUAGE)


def write_post(language: str, weather: int, fruit: int, rng: random.Random) -> str:
    """The text of a post that announces `weather` (0 sunshine, 1 rain) and `fruit` (0 apples, 1 grapes)."""
    phrases = PHRASES[language]
    statements = [
        rng.choice(phrases.forecasts).format(phrases.weather[weather]),
        rng.choice(phrases.offers).format(phrases.fruit[fruit]),
    ]
    rng.shuffle(statements)
    space = "" if language == "zh" else " "
    return space.join(statements)
