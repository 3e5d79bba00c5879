"""Real clips and recordings, made when a test needs them: pictures of one grey each, tones, and spoken words."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest

SAMPLE_RATE = 16_000


def video(
    levels: Sequence[int],
    *,
    codec: str = "libx264",
    container: str = "mp4",
    rate: int = 25,
    gop: int = 25,
    size: tuple[int, int] = (64, 48),
    sound: np.ndarray | None = None,
    options: dict[str, str] | None = None,
) -> bytes:
    """A clip whose frames have these levels of grey, by turns, with a track of sound where there are samples."""
    width, height = size
    shades = (np.full((height, width, 3), level, np.uint8) for level in levels)
    return pictures(shades, codec, container, rate, gop, sound, options)


def pictures(
    frames: Iterable[np.ndarray],
    codec: str = "libx264",
    container: str = "mp4",
    rate: int = 25,
    gop: int = 25,
    sound: np.ndarray | None = None,
    options: dict[str, str] | None = None,
) -> bytes:
    """A clip of frames uint8[height, width, 3]."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=options or {}) as output:
        stream: Any = None
        track = output.add_stream("aac", rate=SAMPLE_RATE, layout="mono") if sound is not None else None
        for number, pixels in enumerate(frames):
            if stream is None:
                stream = output.add_stream(codec, rate=rate)
                stream.height, stream.width = pixels.shape[:2]
                stream.pix_fmt, stream.gop_size = "yuv420p", gop
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if track is not None:
            _encode(output, track, sound, SAMPLE_RATE)
    return buffer.getvalue()


def recording(samples: np.ndarray, *, codec: str = "flac", container: str = "flac", rate: int = SAMPLE_RATE) -> bytes:
    """A file with one channel of sound, samples in [-1, 1]."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        _encode(output, output.add_stream(codec, rate=rate, layout="mono"), samples, rate)
    return buffer.getvalue()


def tone(hertz: float, seconds: float = 1.0, rate: int = SAMPLE_RATE) -> np.ndarray:
    """Samples of a sine."""
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def speech(text: str, voice: str = "en") -> np.ndarray:
    """Samples at 16 kHz of words that espeak-ng speaks."""
    loader = pytest.importorskip("espeakng_loader", reason="no espeak-ng: pip install espeakng-loader")
    library = ctypes.CDLL(loader.get_library_path())
    rate = library.espeak_Initialize(2, 0, loader.get_data_path().encode(), 0)  # 2: wait for each call to end
    parts: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def hear(samples: Any, count: int, events: Any) -> int:
        if samples and count:
            parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(hear)
    assert library.espeak_SetVoiceByName(voice.encode()) == 0
    said = text.encode()
    assert library.espeak_Synth(said, len(said) + 1, 0, 1, 0, 1, None, None) == 0
    library.espeak_Synchronize()
    spoken = np.concatenate(parts) / 32768
    places = np.arange(0, len(spoken), rate / SAMPLE_RATE)
    return np.interp(places, np.arange(len(spoken)), spoken)


def _encode(output: Any, stream: Any, samples: np.ndarray, rate: int) -> None:
    frame = av.AudioFrame.from_ndarray((samples * 32767).astype(np.int16)[None], format="s16", layout="mono")
    frame.rate = rate
    context = stream.codec_context
    resampler = av.AudioResampler(context.format, context.layout, rate, frame_size=context.frame_size or None)
    for resampled in [*resampler.resample(frame), *resampler.resample(None)]:
        output.mux(stream.encode(resampled))
    output.mux(stream.encode(None))
