"""Sound as encoders read it: Whisper's spectrograms, number by number, and waveforms."""

from __future__ import annotations

import clips
import numpy as np
import pytest

from crossguard.configs.errors import UserError
from crossguard.configs.schema.audio import AudioEncoderConfig
from crossguard.data.loading.sound import Hearing, decode_sound

SECONDS = 30


@pytest.mark.parametrize("bins", [80, 128])
def test_spectrograms_are_those_of_whispers_feature_extractor(bins: int) -> None:
    from transformers import WhisperFeatureExtractor

    theirs, ours = WhisperFeatureExtractor(feature_size=bins), Hearing(AudioEncoderConfig(mel_bins=bins))
    draw = np.random.default_rng(bins)
    for count in (1, 401, 16_000, 16_000 * 3 + 77, 16_000 * SECONDS - 1, 16_000 * SECONDS, 16_000 * SECONDS + 5):
        samples = (draw.normal(size=count) * draw.choice([1e-4, 0.1, 1])).astype(np.float32)
        expected = theirs(samples, sampling_rate=16_000, return_tensors="np")["input_features"][0]
        found = ours(samples)
        assert found.shape == (bins, min(count // 160 + 3, 3000))
        # A recording goes on as it ends.
        assert np.abs(found - expected[:, : found.shape[1]]).max() < 2e-4
        assert np.abs(found[:, -1:] - expected[:, found.shape[1] :]).max(initial=0) < 2e-4


def test_spoken_words_are_heard_as_whisper_hears_them() -> None:
    from transformers import WhisperFeatureExtractor

    data = clips.recording(clips.speech("the market opens at nine"))
    samples = decode_sound(data, SECONDS)
    assert samples is not None
    assert 1 < len(samples) / 16_000 < 5
    found = Hearing(AudioEncoderConfig())(samples)
    expected = WhisperFeatureExtractor()(samples, sampling_rate=16_000, return_tensors="np")["input_features"][0]
    assert np.abs(found - expected[:, : found.shape[1]]).max() < 2e-4


def test_waveforms_are_those_of_wav2vec2s_feature_extractor() -> None:
    from transformers import Wav2Vec2FeatureExtractor

    samples = clips.tone(300, 0.7).astype(np.float32) + 0.2
    hearing = Hearing(AudioEncoderConfig(features="waveform", max_seconds=0.5))
    expected = Wav2Vec2FeatureExtractor()(samples[:8_000], sampling_rate=16_000, return_tensors="np")["input_values"][0]
    assert np.abs(hearing(samples) - expected).max() < 1e-5
    assert hearing(samples[:10]).shape == (1600,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"features": "mfcc"}, r"model\.audio\.features=mfcc: .*log_mel"),
        ({"mel_bins": 0}, r"model\.audio\.mel_bins=0: must be at least 1"),
        ({"max_seconds": 0.0}, r"model\.audio\.max_seconds=0\.0: must lie between 0\.1"),
    ],
)
def test_settings_of_sound_are_checked(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AudioEncoderConfig(**values)  # type: ignore[arg-type]
