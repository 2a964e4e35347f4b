"""Frames of a video, drawn evenly, within bounds of bytes, frames, pixels, memory and seconds.

PyAV decodes in a process of its own (mllm/data/video_frames.py). Every failure of it becomes a `BrokenSample`.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

from PIL import Image

from clips import BrokenSample
from clips.common.errors import UserError

Size = tuple[int, int]
"""Height and width in pixels."""
VIDEO: Size = (0, 0)
"""The size of a video among the sizes of pictures: each of its frames is one square, whatever its size."""
NO_VIDEOS = "the model takes no videos: train it with --image_aspect_ratio anyres --frames_upbound 8 (frames)"
ENDINGS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
"""Endings, in lower case, by which a file counts as a video."""
MAX_BYTES = 256 * 2**20
"""Largest file."""
MAX_FRAMES = 2**18
"""Most frames of a file: 2.4 hours at 30 a second."""
MAX_PIXELS = 16_000_000
"""Largest frame; an 8K frame has twice as many."""
KEPT_PIXELS = 2**20
"""A larger frame is divided by a whole number: 720p stays as it is, 1080p is halved."""
MOST_DRAWN = 64
"""Most frames that are drawn of a video."""
MAX_SECONDS = 60.0
"""Processor seconds for one video. A seek goes to the key frame before each frame that is drawn."""
MEMORY = 4 * 2**30
"""Address space of the decoding process, in bytes; its libraries take 0.5 GB of it."""
PROGRAM = Path(__file__).with_name("video_frames.py")
MISSING = "reading a video needs the package av: pip install 'clips-mllm[video]'"


class VideoTokens(int):
    """The number of a video's tokens, which are `<video>` and not `<image>`."""


def is_video(name: str) -> bool:
    """Whether a file's name says that it is a video."""
    return name.lower().endswith(ENDINGS)


def decode_video(data: bytes, frames: int, key: str = "video", seconds: float = MAX_SECONDS) -> list[Image.Image]:
    """`frames` pictures of a video in RGB, upright and of one size, the frames i · total // `frames`.

    Raises BrokenSample(key, reason) unless `data` is a video within the limits, and UserError if PyAV is missing.
    """
    if importlib.util.find_spec("av") is None:
        raise UserError(MISSING)
    if not data:
        raise BrokenSample(key, "video: the file is empty")
    if len(data) > MAX_BYTES:
        raise BrokenSample(key, f"video: {len(data)} bytes are above the limit of {MAX_BYTES}")
    limits = {"most_frames": MAX_FRAMES, "pixels": MAX_PIXELS, "kept_pixels": KEPT_PIXELS}
    request = json.dumps(limits | {"frames": frames, "seconds": seconds, "bytes": MEMORY})
    late = BrokenSample(key, f"video: decoding takes more than {seconds:g} s")
    try:
        # Isolated: nothing of the current directory or of the environment comes between.
        command = [sys.executable, "-I", str(PROGRAM), request]
        ended = subprocess.run(command, input=data, capture_output=True, timeout=2 * seconds, check=False)
    except subprocess.TimeoutExpired:
        raise late from None
    head, _, body = ended.stdout.partition(b"\n")
    if ended.returncode or not head:
        if ended.returncode == -signal.SIGXCPU:
            raise late
        words = ended.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise BrokenSample(key, f"video: the decoder ended with {ended.returncode} {' '.join(words)}".rstrip())
    header = json.loads(head)
    if "error" in header:
        raise BrokenSample(key, f"video: {header['error']}")
    size = header["size"]
    length = 3 * size[0] * size[1]
    return [Image.frombytes("RGB", size, body[i * length : (i + 1) * length]) for i in range(frames)]
