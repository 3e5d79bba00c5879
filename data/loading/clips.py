"""Videos: from the bytes of a file to a few square RGB frames and their times.

The packets of a clip are listed first, which decodes nothing: they say when every frame is shown and from which ones it
can be decoded. Then only what leads to the frames that are wanted is decoded. All bounds are counts, so that a clip
gives the same frames on every machine.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from crossguard.configs.schema.encoders import CROP, STRETCH
from crossguard.configs.schema.video import SCENES
from crossguard.data.loading.decode import MediaError

# Longer videos are looked at from their start up to here.
MAX_SECONDS = 600
# 8K; a small file can unpack to gigabytes.
MAX_PIXELS = 7680 * 4320
# Frames decoded of one clip, whatever is asked for. A frame that lies too far behind one that can be decoded by itself
# is replaced by an earlier one.
MAX_DECODED = 2048
# Frames compared for each one that is taken at a change of scene.
CANDIDATES = 8
# Levels of each colour channel in the histograms that are compared.
LEVELS = 4


@dataclass(frozen=True, slots=True)
class Clip:
    """Some frames of a video."""

    # Each uint8[S, S, 3], RGB.
    frames: list[np.ndarray]
    # float32[len(frames)], seconds from the first frame of the video.
    times: np.ndarray


def sample_frames(data: bytes, count: int, size: int, sampling: str, resize: str = STRETCH) -> Clip:
    """Decode up to `count` frames of a video, in order, each turned upright and made a square.

    With `uniform` they are those in the middle of `count` parts of the same number of frames. With `scenes` eight times
    as many of these are compared, each with the one before it, by the sum of the differences of their colour histograms
    (4 levels a channel): taken are the first one and those that differ most. Of a file that was cut short, what is
    there is sampled.

    Args:
        data: the file's bytes.
        count: the most frames; a shorter video gives all it has.
        size: side S of the frames in pixels.
        sampling: "uniform" or "scenes".
        resize: "stretch" the whole frame, or "crop" its middle.

    Raises:
        MediaError: it holds no video, is damaged, or too large.
    """
    with opened(data) as container:
        stream = _video_stream(container)
        packets = _packets(container, stream)
        wanted = _uniform(len(packets.times), count * CANDIDATES if sampling == SCENES else count)
        shown = list(_decoded(stream, packets, wanted, size, resize == CROP))
        unit = float(stream.time_base)
    if not shown:
        raise MediaError("a video without a frame that can be decoded")
    if sampling == SCENES and len(shown) > count:
        shown = _at_changes(shown, count)
    times = np.array([time for time, _ in shown], dtype=np.float64) - packets.times[0]
    return Clip([frame for _, frame in shown], (times * unit).astype(np.float32))


def check_video(data: bytes) -> str | None:
    """Why a video cannot be used, or None when its middle frame can be decoded."""
    try:
        sample_frames(data, count=1, size=1, sampling="uniform")
    except MediaError as error:
        return str(error)
    return None


@contextmanager
def opened(data: bytes) -> Iterator[Any]:
    """The container in a file's bytes; what ffmpeg cannot make sense of inside the block is a `MediaError`."""
    import av

    try:
        with av.open(io.BytesIO(data), metadata_errors="ignore") as container:
            yield container
    except MediaError:
        raise
    except Exception as error:  # PyAV raises errors of many types on damaged files
        # Their words may hold what the file says of itself.
        raise MediaError(f"damaged, truncated or of an unknown format ({type(error).__name__})") from None


@dataclass(frozen=True, slots=True)
class _Packets:
    """What has to be decoded for which frame."""

    # In the order of decoding.
    packets: list[Any]
    # The frames' times, in the order in which they are shown, in units of the stream's time base.
    times: list[int]
    # For each frame, the packet that holds it, and the one from which decoding leads to it.
    places: list[int]
    starts: list[int]


def _video_stream(container: Any) -> Any:
    import av

    # A cover picture is a stream of video as well.
    attached = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & attached]
    if not streams:
        raise MediaError("a file without video")
    stream = streams[0]
    if stream.codec_context is None:
        raise MediaError("a video of a codec that ffmpeg cannot decode")
    _check_pixels(stream.codec_context.width, stream.codec_context.height)
    stream.codec_context.thread_count = 1  # There are as many processes as cores already.
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    return stream


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError(f"{width} x {height} pixels, the limit is {MAX_PIXELS} in all")


def _packets(container: Any, stream: Any) -> _Packets:
    """Those of the first seconds."""
    end = None
    packets: list[Any] = []
    for packet in container.demux(stream):
        if packet.pts is None or packet.is_discard:
            continue
        end = packet.pts + MAX_SECONDS / stream.time_base if end is None else end
        if packet.dts is not None and packet.dts > end:
            break
        packets.append(packet)
    if not packets:
        raise MediaError("a video without a frame")
    keys = [place for place, packet in enumerate(packets) if packet.is_keyframe]
    shown = sorted(range(len(packets)), key=lambda place: packets[place].pts)
    starts, key = [], 0
    for place in shown:
        # Pictures that follow a key frame and are shown before it may need what came before it.
        while key < len(keys) - 1 and keys[key + 1] <= place and packets[keys[key + 1]].pts <= packets[place].pts:
            key += 1
        starts.append(keys[key] if keys and keys[key] <= place else 0)
    return _Packets(packets, [packets[place].pts for place in shown], shown, starts)


def _uniform(frames: int, count: int) -> list[int]:
    """The numbers of frames in the middle of `count` equal parts; all there are, where they are fewer."""
    return sorted({(2 * part + 1) * frames // (2 * count) for part in range(count)})


def _decoded(
    stream: Any, packets: _Packets, wanted: list[int], size: int, crop: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """(time, uint8[S, S, 3]) of the frames with these numbers, or of the last one before each that can be had."""
    context = stream.codec_context
    allowed = max(1, MAX_DECODED // len(wanted))
    following, waiting = 0, deque[Any]()
    for number in wanted:
        time, start = packets.times[number], packets.starts[number]
        if start > following:
            context.flush_buffers()
            waiting.clear()
            following = start
        frame, stop = None, min(following + allowed, len(packets.packets) + 1)
        while True:
            while waiting and waiting[0].pts <= time:
                frame = waiting.popleft()
            if waiting or following == stop or (frame is not None and frame.pts == time):
                break
            # Behind the last packet, what the decoder has kept back.
            packet = packets.packets[following] if following < len(packets.packets) else None
            waiting.extend(decoded for decoded in context.decode(packet) if decoded.pts is not None)
            following += 1
        if frame is not None:
            yield frame.pts, _square(frame, size, crop)


def _square(frame: Any, size: int, crop: bool) -> np.ndarray:
    """Scaled first and then turned, which is the same for a square, and cheaper."""
    _check_pixels(frame.width, frame.height)
    shorter = min(frame.width, frame.height)
    width, height = (round(side * size / shorter) if crop else size for side in (frame.width, frame.height))
    _check_pixels(width, height)
    scaled: np.ndarray = frame.reformat(width, height, "rgb24", interpolation="BILINEAR").to_ndarray()
    left, above = (width - size) // 2, (height - size) // 2
    return np.rot90(scaled[above : above + size, left : left + size], round(frame.rotation / 90) % 4)


def _at_changes(shown: list[tuple[int, np.ndarray]], count: int) -> list[tuple[int, np.ndarray]]:
    histograms = np.stack([_histogram(frame) for _, frame in shown])
    changes = np.abs(np.diff(histograms, axis=0)).sum(axis=1)
    strongest = np.argsort(-changes, kind="stable")[: count - 1] + 1
    return [shown[number] for number in sorted([0, *strongest.tolist()])]


def _histogram(frame: np.ndarray) -> np.ndarray:
    """int64[64]: pixels of each colour."""
    levels = frame.reshape(-1, 3) // (256 // LEVELS)
    return np.bincount(levels @ np.array([LEVELS * LEVELS, LEVELS, 1]), minlength=LEVELS**3)
