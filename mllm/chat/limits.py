"""Limits for strangers with safe defaults, and pictures and videos from bytes and from public addresses.

Nothing heavy is imported at the top: the commands build their flags from `Limits`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from clips.common.errors import UserError
from clips.common.flags import option

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")
MAX_REDIRECTS = 3
NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses that a gateway maps to IPv4 addresses, also private ones."""
SLOWEST = 100_000
"""Bytes per second that a body must reach after the first `Limits.body_seconds`."""
KEPT_PIXELS = 4_000_000
"""Pixels that a picture keeps; every encoder reads fewer."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Each field is the flag `--max-FIELD`. Raises UserError for a limit that allows nothing."""

    body_bytes: int = option(64 * 2**20, "bytes of one request, pictures included, fetched ones too")
    image_bytes: int = option(10 * 2**20, "bytes of one encoded picture")
    image_pixels: int = option(32_000_000, "pixels of one picture (never above clips.data.images.MAX_PIXELS)")
    images: int = option(20, "pictures of one request")
    video_bytes: int = option(32 * 2**20, "bytes of one encoded video")
    video_seconds: float = option(10.0, "processor seconds that decoding one video may take")
    squares: int = option(100, "squares that the encoder reads for one request: tiles of pictures, frames of videos")
    prompt_chars: int = option(100_000, "characters of all texts of one request")
    inputs: int = option(128, "inputs of one embeddings request")
    new_tokens: int = option(1024, "tokens of one answer")
    waiting: int = option(32, "requests that wait while another one is answered; more are refused")
    per_client: int = option(24, "requests of one client's address at a time, those still arriving included")
    held_bytes: int = option(2**29, "bytes of all requests that arrive, wait or are answered; more are refused")
    body_seconds: float = option(20.0, "seconds that a request's body may take to arrive, and one more per 100 kB")
    upload_bytes: int = option(2**30, "bytes of all pictures that visitors have uploaded to the page")
    seconds: float = option(120.0, "seconds that one answer may take before it is cut off")
    fetch_seconds: float = option(10.0, "seconds that fetching one picture may take")

    def __post_init__(self) -> None:
        for field in fields(self):
            least, value = 0 if field.name == "waiting" else 1, getattr(self, field.name)
            if not value >= least:
                raise UserError(f"--max-{field.name.replace('_', '-')} must be at least {least}, not {value}")


def read_image(data: bytes, limits: Limits) -> Image.Image:
    """The picture in `data` as upright RGB of at most KEPT_PIXELS. Raises UserError for bad or too large data."""
    from clips import decode_image

    return _read(decode_image, data, limits)


def image_size(data: bytes, limits: Limits) -> tuple[int, int]:
    """(height, width) of `read_image`'s picture from its header. Raises UserError as `read_image`."""
    from clips import decoded_size

    return _read(decoded_size, data, limits)


def _read(reader: Callable[..., T], data: bytes, limits: Limits) -> T:
    from clips import MAX_PIXELS, BrokenSample

    if len(data) > limits.image_bytes:
        raise UserError(f"the picture has {len(data):,} bytes, the limit is {limits.image_bytes:,}")
    try:
        return reader(data, max_pixels=min(limits.image_pixels, MAX_PIXELS), reduce_to=KEPT_PIXELS)
    except BrokenSample as broken:
        reason = re.sub(r" <_io.*?>", "", broken.reason.removeprefix("image: "))  # Pillow names its buffer
        raise UserError(f"the picture cannot be read: {reason}") from None


def read_video(data: bytes, frames: int, limits: Limits) -> list[Image.Image]:
    """`frames` frames of the video in `data`. Raises UserError for bad or too large data."""
    from clips import BrokenSample
    from mllm.data.video import decode_video

    if len(data) > limits.video_bytes:
        raise UserError(f"the video has {len(data):,} bytes, the limit is {limits.video_bytes:,}")
    try:
        return decode_video(data, frames, seconds=limits.video_seconds)
    except BrokenSample as broken:
        raise UserError(f"the video cannot be read: {broken.reason.removeprefix('video: ')}") from None


# ------------------------------------------------------------------------------------------------ from an address
def fetch_image(url: str, limits: Limits, most: int | None = None) -> bytes:
    """`download_image` outside an event loop."""
    return asyncio.run(download_image(url, limits, most))


async def download_image(url: str, limits: Limits, most: int | None = None) -> bytes:
    """The bytes behind an http(s) address. Raises UserError with the reason if they are not fetched.

    There may be `most` of them (default: `Limits.image_bytes`).

    It connects to public addresses only. It resolves a name once, checks all its addresses, and connects to a checked
    address itself, so a second answer of the name server changes nothing. Redirects pass the same check. It does not
    use the environment's proxies, which would connect elsewhere.
    """
    try:
        return await asyncio.wait_for(_download(url, limits, most or limits.image_bytes), limits.fetch_seconds)
    except asyncio.TimeoutError:
        raise UserError(f"the picture's address did not answer within {limits.fetch_seconds:g} s") from None


async def _download(url: str, limits: Limits, most: int) -> bytes:
    import httpx2

    try:
        place = httpx2.URL(url)
        async with httpx2.AsyncClient(trust_env=False, timeout=limits.fetch_seconds) as client:
            for _ in range(MAX_REDIRECTS + 1):
                address = await _public_address(place.scheme, place.host, place.port)
                async with client.stream(
                    "GET",
                    place.copy_with(host=address),
                    headers={
                        "Host": place.netloc.decode(),
                        "Accept": "image/*, video/*",
                        "Accept-Encoding": "identity",
                    },
                    extensions={"sni_hostname": place.host},  # the certificate must be the name's, not the address's
                    follow_redirects=False,
                ) as response:
                    if response.has_redirect_location:
                        place = place.join(response.headers["location"])
                        continue
                    if response.status_code != 200:
                        raise UserError(f"the picture's address answered with status {response.status_code}")
                    return await _body(response.aiter_raw(), most)
    except (httpx2.HTTPError, httpx2.InvalidURL, UnicodeError, ValueError) as error:
        raise UserError(f"the picture's address cannot be read ({type(error).__name__})") from None
    raise UserError(f"the picture's address redirects more than {MAX_REDIRECTS} times")


async def _body(chunks: Any, most: int) -> bytes:
    data = bytearray()
    async for chunk in chunks:
        data += chunk
        if len(data) > most:
            raise UserError(f"the picture behind the address has more than {most:,} bytes")
    return bytes(data)


async def _public_address(scheme: str, host: str, port: int | None) -> str:
    """An address of `host`. Raises UserError unless all its addresses are public."""
    if scheme not in ("http", "https") or not host:
        raise UserError("pictures are fetched from http:// and https:// addresses only")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port or 443, type=socket.SOCK_STREAM)
    except OSError:
        raise UserError(f"the picture's address cannot be read: {host!r} has no address") from None
    addresses = [str(entry[4][0]) for entry in found]
    if not all(map(is_public, addresses)):
        raise UserError("pictures are fetched from public addresses only")
    return addresses[0]


def is_public(address: str) -> bool:
    """True for a public IP address; an IPv4 address inside an IPv6 address counts as itself."""
    ip = ipaddress.ip_address(address)
    if ip.version == 6:
        if ip in NAT64 or ip.teredo:
            return False
        ip = ip.ipv4_mapped or ip.sixtofour or ip
    return ip.is_global and not ip.is_multicast
