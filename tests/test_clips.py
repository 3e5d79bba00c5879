"""Frames of real videos: which ones, how they lie, how much is decoded for them, and what is refused."""

from __future__ import annotations

import struct
from typing import Any

import clips
import numpy as np
import pytest

from crossguard.data.loading import clips as decoding
from crossguard.data.loading.clips import check_video, sample_frames
from crossguard.data.loading.decode import MediaError
from crossguard.data.loading.sound import check_sound, decode_sound

RAMP = [number * 2 for number in range(100)]
KINDS = [("libx264", "mp4"), ("libx264", "matroska"), ("mpeg4", "avi"), ("libvpx-vp9", "webm"), ("libx264", "mpegts")]


@pytest.mark.parametrize(("codec", "container"), KINDS)
def test_uniform_frames_lie_in_the_middle_of_equal_parts(codec: str, container: str) -> None:
    clip = sample_frames(clips.video(RAMP, codec=codec, container=container), 4, 16, "uniform")
    assert clip.times.tolist() == pytest.approx([0.48, 1.48, 2.48, 3.48], abs=0.05)
    assert clip.times.dtype == np.float32
    for frame, time in zip(clip.frames, clip.times, strict=True):
        assert (frame.shape, frame.dtype) == ((16, 16, 3), np.uint8)
        assert frame.mean() == pytest.approx(2 * 25 * time, abs=6)


def test_frames_of_scenes_are_those_at_the_strongest_changes() -> None:
    levels = [20] * 33 + [200] * 40 + [90] * 27
    clip = sample_frames(clips.video(levels), 3, 16, "scenes")
    assert [round(frame.mean() / 10) * 10 for frame in clip.frames] == [20, 200, 90]
    # 24 of 100 frames are compared: the first of each scene among them.
    assert clip.times[1] == pytest.approx(33 / 25, abs=5 / 25)
    assert clip.times[2] == pytest.approx(73 / 25, abs=5 / 25)
    uniform = sample_frames(clips.video(levels), 3, 16, "uniform")
    assert uniform.times.tolist() != clip.times.tolist()


def test_a_short_video_gives_all_that_it_has_and_the_same_every_time() -> None:
    data = clips.video([0, 100, 200])
    one, other = (sample_frames(data, 8, 16, "uniform") for _ in range(2))
    assert [round(frame.mean() / 100) for frame in one.frames] == [0, 1, 2]
    assert all(np.array_equal(a, b) for a, b in zip(one.frames, other.frames, strict=True))
    assert one.times.tolist() == other.times.tolist()


def test_decoding_is_bounded_by_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = [0]

    class Counting:
        """A decoder that counts what it is given."""

        def __init__(self, context: Any):
            self.context = context

        def decode(self, packet: Any) -> Any:
            decoded[0] += packet is not None
            return self.context.decode(packet)

        def flush_buffers(self) -> None:
            self.context.flush_buffers()

    real = decoding._decoded

    def counted(stream: Any, *arguments: Any) -> Any:
        watched = type("Stream", (), {"codec_context": Counting(stream.codec_context)})
        return real(watched, *arguments)

    monkeypatch.setattr(decoding, "_decoded", counted)
    # One key frame alone: whatever is wanted has to be decoded from the start.
    data = clips.video(RAMP, gop=1000)
    exact = sample_frames(data, 4, 16, "uniform")
    assert 80 < decoded[0] <= 100
    monkeypatch.setattr(decoding, "MAX_DECODED", 40)
    decoded[0] = 0
    bounded = sample_frames(data, 4, 16, "uniform")
    assert decoded[0] <= 40
    assert len(bounded.frames) == 4
    assert (bounded.times < exact.times).all()
    # Many key frames: only what leads to the frames is decoded.
    decoded[0] = 0
    assert sample_frames(clips.video(RAMP, gop=5), 4, 16, "uniform").times.tolist() == exact.times.tolist()
    assert decoded[0] <= 40
    monkeypatch.setattr(decoding, "MAX_SECONDS", 1)
    assert sample_frames(data, 4, 16, "uniform").times.max() <= 1.1
    monkeypatch.setattr(decoding, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(MediaError, match="64 x 48 pixels, the limit is 3071"):
        sample_frames(data, 4, 16, "uniform")


def test_frames_are_turned_as_the_file_says() -> None:
    half = np.zeros((48, 64, 3), dtype=np.uint8)
    half[:24] = 255
    data = bytearray(clips.pictures([half] * 3))
    upright = sample_frames(bytes(data), 1, 16, "uniform").frames[0]
    assert upright[:6].mean() > 240 > 15 > upright[-6:].mean()
    # The matrix of a track's header (ISO/IEC 14496-12, 8.3.2), as phones that are held upright write it: to the right.
    header = data.index(b"tkhd")
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    data[header + 44 : header + 80] = matrix
    turned = sample_frames(bytes(data), 1, 16, "uniform").frames[0]
    assert turned[:, -6:].mean() > 240 > 15 > turned[:, :6].mean()


def test_what_cannot_be_decoded_is_refused() -> None:
    mp4, tone = clips.video(RAMP), clips.recording(clips.tone(440))
    hole = bytearray(mp4)
    start = hole.index(b"mdat") + 4
    hole[start : start + 1000] = b"\x55" * 1000
    for damaged in (b"", b"GIF89a", b"\0\0\0\x18ftypmp42", mp4[: len(mp4) // 2], bytes(hole)):
        with pytest.raises(MediaError, match=r"damaged, truncated or of an unknown format \(\w+\)"):
            sample_frames(damaged, 4, 16, "uniform")
    assert check_video(tone) == "a file without video"
    assert check_video(mp4) is None
    assert check_sound(mp4) == "a file without sound"
    assert check_sound(tone) is None
    assert check_sound(b"fLaC") is not None


@pytest.mark.parametrize(
    ("codec", "container", "rate"),
    [("flac", "flac", 44_100), ("pcm_s16le", "wav", 8_000), ("libmp3lame", "mp3", 48_000)],
)
def test_sound_is_one_channel_at_16_khz(codec: str, container: str, rate: int) -> None:
    data = clips.recording(clips.tone(440, 2.0, rate), codec=codec, container=container, rate=rate)
    samples = decode_sound(data, 30)
    assert samples is not None
    assert (samples.dtype, samples.ndim) == (np.float32, 1)
    assert len(samples) / 16_000 == pytest.approx(2.0, abs=0.1)
    assert np.abs(np.fft.rfft(samples)).argmax() * 16_000 / len(samples) == pytest.approx(440, abs=2)
    assert np.abs(samples).max() == pytest.approx(0.5, abs=0.05)
    part = decode_sound(data, 0.5)
    assert part is not None
    assert np.array_equal(part, samples[:8_000])


def test_what_is_heard_in_a_video_is_decoded_beside_its_frames() -> None:
    data = clips.video(RAMP, sound=clips.tone(1000, 4.0))
    samples = decode_sound(data, 30)
    assert samples is not None
    assert np.abs(np.fft.rfft(samples)).argmax() * 16_000 / len(samples) == pytest.approx(1000, abs=2)
    assert len(sample_frames(data, 4, 16, "uniform").frames) == 4
    assert decode_sound(clips.video(RAMP), 30) is None


def test_ffmpeg_says_nothing_on_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert check_video(clips.video(RAMP)[:-2000]) is not None
    assert capfd.readouterr() == ("", "")


def test_a_crop_is_the_middle_of_a_frame() -> None:
    stripes = np.repeat(np.array([20, 120, 220], np.uint8), 48)[None, :, None].repeat(48, 0).repeat(3, 2)
    data = clips.pictures([stripes] * 4)
    (whole,), (middle,) = (sample_frames(data, 1, 16, "uniform", resize).frames for resize in ("stretch", "crop"))
    assert middle.shape == whole.shape == (16, 16, 3)
    assert [int(whole[8, x].mean().round(-1)) for x in (2, 8, 13)] == [20, 120, 220]
    assert middle[:, 2:-2].mean() == pytest.approx(120, abs=4)
    assert middle[:, 2:-2].std() < 4
