"""A program that decodes frames of a video for mllm/data/video.py in a separate process.

Videos may be untrusted. A demuxer trusts the numbers in a file when it builds its index, and native decoders may
crash. Therefore this process limits its own memory and time, and a crash of it harms nothing else.

Its argument is JSON with the limits and the number of frames, and standard input is the file. It prints one line of
JSON, {"size": [width, height]} or {"error": reason}, then the RGB bytes of each frame. It imports nothing of this
project, which is not on its path.
"""

import bisect
import contextlib
import io
import json
import math
import resource
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import av
import numpy as np
from av.stream import Disposition

FORMATS = "mov,mp4,matroska,webm,avi"
"""Demuxers that may be used. Others are refused, because a playlist (HLS, concat) could open any file or address."""


def chosen(total: int, count: int) -> list[int]:
    """Draw `count` of the frames 0 … `total` − 1 evenly, as transformers does. A short video repeats frames."""
    return [i * total // count for i in range(count)]


def frames_of(data: bytes, frames: int, kept_pixels: int) -> list[np.ndarray]:
    """Decode the drawn frames to uint8 [H, W, 3] of equal sizes. Raises ValueError or av's errors for bad data."""
    options = {"format_whitelist": FORMATS}
    # Ignore metadata that is not UTF-8. av 19 and later always do so, and have no such option.
    lenient: dict[str, Any] = {} if int(av.__version__.partition(".")[0]) >= 19 else {"metadata_errors": "ignore"}
    with av.open(io.BytesIO(data), mode="r", options=options, **lenient) as container:
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise ValueError("the file has no video stream")
        stream = streams[0]
        times, keys = [], []
        for packet in container.demux(stream):  # counts frames without decoding, as the number in the file may be wrong
            if not packet.size or packet.is_discard:
                continue
            times.append(packet.pts)
            keys += [packet.pts] * packet.is_keyframe
        if not times:
            raise ValueError("it has no frames")
        ordered = sorted(time for time in times if time is not None)
        starts = sorted(time for time in keys if time is not None)
        numbers = chosen(len(times), frames)
        if len(ordered) < len(times) or not starts:  # AVI has no times, so its frames are counted from the first
            return upright(numbered(container, stream, numbers), kept_pixels)
        return upright(timed(container, stream, starts, [ordered[i] for i in numbers]), kept_pixels)


def timed(container: Any, stream: Any, keys: list[int], times: list[int]) -> Iterator[Any]:
    """Yield the frames at ascending `times`, each after a seek to the last key frame unless that is decoded already."""
    frame, decoder = None, None
    for target in times:
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
        yield frame


def numbered(container: Any, stream: Any, numbers: list[int]) -> Iterator[Any]:
    """Yield the frames with ascending `numbers`. All frames up to them are decoded."""
    container.seek(0)
    frame, at = None, -1
    decoder: Iterator[Any] = container.decode(stream)
    for target in numbers:
        while at < target:
            following = next(decoder, None)
            if following is None:
                break
            frame, at = following, at + 1
        yield frame


def upright(frames: Iterable[Any], kept_pixels: int) -> list[np.ndarray]:
    """Return the frames as upright images in the size of the first one. Raises ValueError for a missing frame."""
    images: list[np.ndarray] = []
    size, last = (0, 0), None
    for frame in frames:
        if frame is None:
            raise ValueError("none of its frames can be decoded")
        if frame is last:
            images.append(images[-1])
            continue
        if last is None:
            factor = math.ceil(math.sqrt(frame.width * frame.height / kept_pixels)) or 1
            size = math.ceil(frame.width / factor), math.ceil(frame.height / factor)
        last = frame
        fitted = {"width": size[0], "height": size[1], "interpolation": "AREA"}
        array = frame.to_ndarray(format="rgb24", **fitted if (frame.width, frame.height) != size else {})
        images.append(np.rot90(array, round(frame.rotation / 90)))
    return images


def main() -> None:
    """Decode the video on stdin within the limits in argv; write a JSON header and the frames to stdout."""
    request = json.loads(sys.argv[1])
    limits = {resource.RLIMIT_AS: request.pop("bytes"), resource.RLIMIT_CPU: math.ceil(request.pop("seconds"))}
    for kind, most in limits.items():
        with contextlib.suppress(ValueError, OSError):  # not every system has both limits
            resource.setrlimit(kind, (most, most + 1))
    images: list[np.ndarray] = []
    try:
        images = frames_of(sys.stdin.buffer.read(), **request)
        header: dict[str, Any] = {"size": images[0].shape[1::-1]}
    except MemoryError:  # also av's own class
        header = {"error": "it takes too much memory to decode"}
    except av.error.FFmpegError as error:  # before ValueError, because some of these are ValueErrors too
        header = {"error": f"it is no whole mp4, mov, mkv, webm or avi file ({error.strerror})"}
    except ValueError as error:
        header = {"error": str(error)}
    sys.stdout.buffer.write(json.dumps(header).encode() + b"\n" + b"".join(p.tobytes() for p in images))


if __name__ == "__main__":
    main()
