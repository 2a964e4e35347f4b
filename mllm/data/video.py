"""Draw frames evenly from a video, within limits on bytes, memory and time.

PyAV decodes in a separate process (mllm/data/video_frames.py), and each of its failures becomes a `BrokenSample`.
"""

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
"""Stands for a video in a list of image sizes, because each frame is one square, whatever its size."""
NO_VIDEOS = "the model takes no videos: train it with --image_aspect_ratio anyres --frames_upbound 8 (frames)"
ENDINGS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
"""File name extensions, in lower case, of videos."""
MAX_BYTES = 256 * 2**20
"""Largest file, in bytes."""
KEPT_PIXELS = 2**20
"""The sides of a larger frame are divided by a whole number: 720p stays as it is, 1080p is halved."""
MOST_DRAWN = 64
"""Most frames that can be drawn from a video."""
MAX_SECONDS = 60.0
"""CPU seconds for one video. Before each drawn frame the decoder seeks to the last key frame."""
MEMORY = 4 * 2**30
"""Address space of the decoding process, in bytes, of which its libraries take 0.5 GB."""
PROGRAM = Path(__file__).with_name("video_frames.py")
MISSING = "reading a video needs the package av: pip install 'clips-mllm[video]'"


class VideoTokens(int):
    """The number of tokens of a video, whose placeholders are `<video>` instead of `<image>`."""


def is_video(name: str) -> bool:
    """Return True if the file name ends like that of a video."""
    return name.lower().endswith(ENDINGS)


def decode_video(data: bytes, frames: int, key: str = "video", seconds: float = MAX_SECONDS) -> list[Image.Image]:
    """Decode the frames i · total // `frames` of a video to upright RGB images of one size.

    Raises BrokenSample(key, reason) unless `data` is a video within the limits, and UserError if PyAV is missing.
    """
    if importlib.util.find_spec("av") is None:
        raise UserError(MISSING)
    if not data:
        raise BrokenSample(key, "video: the file is empty")
    if len(data) > MAX_BYTES:
        raise BrokenSample(key, f"video: {len(data)} bytes are above the limit of {MAX_BYTES}")
    request = json.dumps({"frames": frames, "kept_pixels": KEPT_PIXELS, "seconds": seconds, "bytes": MEMORY})
    late = BrokenSample(key, f"video: decoding takes more than {seconds:g} s")
    try:
        # Isolated (-I) from modules in the current directory and from the environment.
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
