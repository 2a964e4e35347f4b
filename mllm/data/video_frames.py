"""The program that decodes frames of a video for mllm/data/video.py, in a process of its own.

Videos come from strangers. A demuxer builds its index from the numbers that a file claims, and decoders of native code
may crash. So the process bounds its own memory and time, and its end harms nobody.

Its argument is JSON: the bounds, and the number of frames. Standard input is the file. Standard output is one line of
JSON, {"size": [width, height]} or {"error": reason}, then the RGB bytes of each frame. It imports nothing of this
project, which is not on its path.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import json
import math
import resource
import sys
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from av.stream import Disposition

FORMATS = "mov,mp4,matroska,webm,avi"
"""Demuxers of files with an index. Others are refused: a playlist (HLS, concat) would open any file and address."""


def chosen(total: int, count: int) -> list[int]:
    """`count` of the frames 0 … `total` − 1, evenly, as transformers draws them; a short video repeats frames."""
    return [i * total // count for i in range(count)]


def frames_of(data: bytes, frames: int, most_frames: int, pixels: int, kept_pixels: int) -> list[np.ndarray]:
    """uint8 [H, W, 3] of each chosen frame, in equal sizes. Raises ValueError or av's errors for bad data."""
    options = {"format_whitelist": FORMATS}
    # Metadata that is not UTF-8 ends no decoding. From av 19 on there is no such flag, and it never does.
    lenient: dict[str, Any] = {} if int(av.__version__.partition(".")[0]) >= 19 else {"metadata_errors": "ignore"}
    with av.open(io.BytesIO(data), mode="r", options=options, **lenient) as container:
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise ValueError("the file has no video stream")
        stream = streams[0]
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > pixels:
            raise ValueError(f"its frames of {width} × {height} pixels are above the limit of {pixels}")
        times, keys = [], []
        for packet in container.demux(stream):  # counted without decoding: the number that a file claims may be wrong
            if not packet.size or packet.is_discard:
                continue
            times.append(packet.pts)
            keys += [packet.pts] * packet.is_keyframe
            if len(times) > most_frames:
                raise ValueError(f"it has more than {most_frames} frames")
        if not times:
            raise ValueError("it has no frames")
        ordered = sorted(time for time in times if time is not None)
        starts = sorted(time for time in keys if time is not None)
        if len(ordered) < len(times) or not starts:  # AVI has no times: its frames are counted from the first
            ordered, frames_at = list(range(len(times))), numbered(container, stream)
        else:
            frames_at = timed(container, stream, starts)
        return picked([ordered[i] for i in chosen(len(ordered), frames)], frames_at, kept_pixels)


def timed(container: Any, stream: Any, keys: list[int]) -> Any:
    """A generator that is sent a time, and gives the frame shown then: it seeks to the last key frame before."""
    frame, decoder = None, None
    target = yield None
    while True:
        key = keys[max(bisect.bisect_right(keys, target) - 1, 0)]
        if decoder is None or frame is None or frame.pts is None or frame.pts < key:
            container.seek(key, stream=stream, backward=True)
            decoder = container.decode(stream)
            frame = None
        while frame is None or frame.pts is None or frame.pts < target:
            following = next(decoder, None)
            if following is None:
                break
            frame = following
        target = yield frame


def numbered(container: Any, stream: Any) -> Any:
    """The same for the number of a frame: it decodes from the first one."""
    container.seek(0)
    frame, at = None, -1
    decoder: Iterator[Any] = container.decode(stream)
    target = yield None
    while True:
        while at < target:
            following = next(decoder, None)
            if following is None:
                break
            frame, at = following, at + 1
        target = yield frame


def picked(targets: list[int], frames_at: Any, kept_pixels: int) -> list[np.ndarray]:
    """The pictures of `targets`, upright, and in the size of the first one."""
    next(frames_at)
    pictures: list[np.ndarray] = []
    size, last = (0, 0), None
    for target in targets:
        frame = frames_at.send(target)
        if frame is None:
            raise ValueError("none of its frames can be decoded")
        if frame is last:
            pictures.append(pictures[-1])
            continue
        if last is None:
            factor = math.ceil(math.sqrt(frame.width * frame.height / kept_pixels)) or 1
            size = math.ceil(frame.width / factor), math.ceil(frame.height / factor)
        last = frame
        fitted = {"width": size[0], "height": size[1], "interpolation": "AREA"}
        array = frame.to_ndarray(format="rgb24", **fitted if (frame.width, frame.height) != size else {})
        pictures.append(np.rot90(array, round(frame.rotation / 90)))
    return pictures


def main() -> None:
    request = json.loads(sys.argv[1])
    limits = {resource.RLIMIT_AS: request.pop("bytes"), resource.RLIMIT_CPU: math.ceil(request.pop("seconds"))}
    for kind, most in limits.items():
        with contextlib.suppress(ValueError, OSError):  # not every system has both
            resource.setrlimit(kind, (most, most + 1))
    pictures: list[np.ndarray] = []
    try:
        pictures = frames_of(sys.stdin.buffer.read(), **request)
        header: dict[str, Any] = {"size": pictures[0].shape[1::-1]}
    except MemoryError:  # av's own is one too
        header = {"error": "it takes too much memory to decode"}
    except av.error.FFmpegError as error:  # some of them are ValueErrors too
        header = {"error": f"it is no whole mp4, mov, mkv, webm or avi file ({error.strerror})"}
    except ValueError as error:
        header = {"error": str(error)}
    sys.stdout.buffer.write(json.dumps(header).encode() + b"\n" + b"".join(p.tobytes() for p in pictures))


if __name__ == "__main__":
    main()
