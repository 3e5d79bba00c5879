"""Sound: from the bytes of a recording or a video to samples, and to the spectrograms that Whisper was trained with."""

from __future__ import annotations

from typing import Any

import numpy as np

from crossguard.configs.schema.audio import FRAMES_PER_SECOND, LOG_MEL, SAMPLE_RATE, AudioEncoderConfig
from crossguard.data.loading.clips import opened
from crossguard.data.loading.decode import MediaError

WINDOW = 400
# Samples: encoders of waveforms need 25 ms for a token.
SHORTEST = SAMPLE_RATE // 10
HOP = SAMPLE_RATE // FRAMES_PER_SECOND
# Power below which everything counts as silence, and how many tenths of bels below the loudest it begins.
FLOOR, RANGE = 1e-10, 8.0


def decode_sound(data: bytes, seconds: float) -> np.ndarray | None:
    """The start of what can be heard in a recording or a video; nothing beyond it is decoded.

    Args:
        data: the file's bytes.
        seconds: how much at most.

    Returns:
        float32[n] in [-1, 1], 16 kHz, all channels mixed into one; None when the file has no sound.

    Raises:
        MediaError: damaged, or of another format.
    """
    most = round(seconds * SAMPLE_RATE)
    parts: list[np.ndarray] = []
    with opened(data) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        if stream.codec_context is None:
            raise MediaError("sound of a codec that ffmpeg cannot decode")
        stream.codec_context.thread_count = 1
        heard = 0
        for part in _resampled(container, stream):
            parts.append(part)
            heard += len(part)
            if heard >= most:
                break
    return np.concatenate(parts)[:most] if parts else None


def check_sound(data: bytes) -> str | None:
    """Why a recording cannot be used, or None when its start can be decoded."""
    try:
        return None if decode_sound(data, seconds=0.1) is not None else "a file without sound"
    except MediaError as error:
        return str(error)


def _resampled(container: Any, stream: Any) -> Any:
    import av

    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
    for frame in container.decode(stream):
        frame.pts = None  # Gaps in the times of a damaged or edited file are not filled up.
        for resampled in resampler.resample(frame):
            yield resampled.to_ndarray()[0]
    for resampled in resampler.resample(None):
        yield resampled.to_ndarray()[0]


class Hearing:
    """Samples → what the encoder of sound reads. Picklable."""

    def __init__(self, config: AudioEncoderConfig):
        self.max_seconds = config.max_seconds
        self.mel = _mel_filters(config.mel_bins) if config.features == LOG_MEL else None
        # A second of it stands for recordings in a batch that has none.
        self.silence = self(np.zeros(SAMPLE_RATE, dtype=np.float32))

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """float32[n] at 16 kHz, of which `max_seconds` are heard → float32[max(n, 1600)], a waveform that encoders can
        make a token of, or a spectrogram float32[mel_bins, n // 160 + 3]."""
        samples = samples[: round(self.max_seconds * SAMPLE_RATE)]
        most = round(self.max_seconds * FRAMES_PER_SECOND)
        return standardise(samples) if self.mel is None else log_mel(samples, self.mel, most)


def standardise(samples: np.ndarray) -> np.ndarray:
    """float32[n] with mean 0 and variance 1, as wav2vec 2.0 (arXiv 2006.11477) reads it; less than a tenth of a second
    goes on in silence."""
    wide = samples.astype(np.float64)
    scaled = ((wide - wide.mean()) / np.sqrt(wide.var() + 1e-7)).astype(np.float32)
    return np.pad(scaled, (0, max(0, SHORTEST - len(scaled))))


def log_mel(samples: np.ndarray, mel: np.ndarray, most: int) -> np.ndarray:
    """The spectrogram that Whisper reads (arXiv 2212.04356): windows of 25 ms every 10 ms, mel bins, the logarithm of
    their power cut off 80 dB below the loudest and scaled to about [-1, 1].

    Args:
        samples: float32[n] at 16 kHz, taken to be followed by silence.
        mel: float64[201, bins], filters.
        most: frames of the longest recording.

    Returns:
        float32[bins, f ≤ most]: the frames that hold anything of the samples, and one of silence, which all that follow
        are like.
    """
    count = min(len(samples) // HOP + 3, most)
    half, end = WINDOW // 2, WINDOW // 2 + most * HOP
    padded = np.zeros(end + half)
    padded[half : half + len(samples)] = samples
    # Mirrored at both ends of the longest recording, so that the first window lies around the first sample.
    padded[:half], padded[end:] = padded[half + 1 : WINDOW + 1][::-1], padded[end - half - 1 : end - 1][::-1]
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[: count * HOP : HOP]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    power = np.abs(np.fft.rfft(windows * hann)) ** 2
    spectrogram = np.log10(np.maximum(power @ mel, FLOOR)).T
    spectrogram = np.maximum(spectrogram, spectrogram.max() - RANGE)
    return ((spectrogram + 4) / 4).astype(np.float32)


def _mel_filters(bins: int) -> np.ndarray:
    """float64[201, bins]"""
    from transformers.audio_utils import mel_filter_bank

    filters: np.ndarray = mel_filter_bank(
        1 + WINDOW // 2, bins, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
    )
    return filters
