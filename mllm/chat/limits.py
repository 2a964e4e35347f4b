"""What strangers may ask for: limits with safe defaults, pictures from bytes, and pictures from public addresses.

Nothing heavy is imported at the top: the commands build their flags from `Limits`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clips.common.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
MAX_REDIRECTS = 3
NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses that a gateway turns into IPv4 ones, private ones too."""
KEPT_PIXELS = 4_000_000
"""Pixels that a picture keeps: more than any encoder reads."""


def _limit(default: float, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Each field is the flag `--max-FIELD` (`add_limit_flags`). Raises UserError for a limit that allows nothing."""

    body_bytes: int = _limit(64 * 2**20, "bytes of one request, pictures included, fetched ones too")
    image_bytes: int = _limit(10 * 2**20, "bytes of one encoded picture")
    image_pixels: int = _limit(32_000_000, "pixels of one picture (never above clips.data.images.MAX_PIXELS)")
    images: int = _limit(20, "pictures of one request")
    prompt_chars: int = _limit(100_000, "characters of all texts of one request")
    inputs: int = _limit(128, "inputs of one embeddings request")
    new_tokens: int = _limit(1024, "tokens of one answer")
    waiting: int = _limit(32, "requests that wait while another one is answered; more are refused")
    per_client: int = _limit(24, "requests of one client's address at a time, those still arriving included")
    held_bytes: int = _limit(2**29, "bytes of all requests that arrive, wait or are answered; more are refused")
    body_seconds: float = _limit(20.0, "seconds that a request's body may take to arrive, and one more per 100 kB")
    upload_bytes: int = _limit(2**30, "bytes of all pictures that visitors have uploaded to the page")
    seconds: float = _limit(120.0, "seconds that one answer may take before it is cut off")
    fetch_seconds: float = _limit(10.0, "seconds that fetching one picture may take")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            least = 0 if field.name == "waiting" else 1
            if not getattr(self, field.name) >= least:
                raise UserError(f"{_flag(field.name)} must be at least {least}, not {getattr(self, field.name)}")


def _flag(name: str) -> str:
    return f"--max-{name.replace('_', '-')}"


def add_limit_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per field of `Limits`."""
    group = parser.add_argument_group("limits")
    for field in dataclasses.fields(Limits):
        group.add_argument(
            _flag(field.name), type=type(field.default), default=field.default, help=field.metadata["help"]
        )


def add_host_flag(parser: argparse._ActionsContainer) -> None:
    """--allowed-hosts, of mllm/chat/hosts.py."""
    parser.add_argument(
        "--allowed-hosts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names that browsers may reach this by beside addresses, localhost and this machine's own; *: any",
    )


def limits_from_flags(flags: argparse.Namespace) -> Limits:
    """The `Limits` that the flags of `add_limit_flags` describe."""
    return Limits(**{field.name: getattr(flags, f"max_{field.name}") for field in dataclasses.fields(Limits)})


def read_image(data: bytes, limits: Limits) -> Image.Image:
    """The picture in `data` as upright RGB of at most KEPT_PIXELS; UserError where it is none or is above a limit."""
    from clips import MAX_PIXELS, BrokenSample, decode_image

    if len(data) > limits.image_bytes:
        raise UserError(f"the picture has {len(data):,} bytes, the limit is {limits.image_bytes:,}")
    try:
        return decode_image(data, max_pixels=min(limits.image_pixels, MAX_PIXELS), reduce_to=KEPT_PIXELS)
    except BrokenSample as broken:
        reason = re.sub(r" <_io.*?>", "", broken.reason.removeprefix("image: "))  # Pillow names its buffer
        raise UserError(f"the picture cannot be read: {reason}") from None


# ------------------------------------------------------------------------------------------------ from an address
def fetch_image(url: str, limits: Limits) -> bytes:
    """The bytes behind an http(s) address, see `download_image`; not to be called inside an event loop."""
    return asyncio.run(download_image(url, limits))


async def download_image(url: str, limits: Limits) -> bytes:
    """The bytes behind an http(s) address; UserError with the reason when they are not fetched.

    Only public addresses are connected to. A name is resolved once, every address it has is checked, and the
    connection goes to the checked address itself, so a second answer of the name server changes nothing. Redirects
    are followed by hand through the same check. Proxies of the environment, which connect for us, are not used.
    """
    try:
        return await asyncio.wait_for(_download(url, limits), limits.fetch_seconds)
    except asyncio.TimeoutError:
        raise UserError(f"the picture's address did not answer within {limits.fetch_seconds:g} s") from None


async def _download(url: str, limits: Limits) -> bytes:
    import httpx2

    try:
        place = httpx2.URL(url)
        async with httpx2.AsyncClient(trust_env=False, timeout=limits.fetch_seconds) as client:
            for _ in range(MAX_REDIRECTS + 1):
                address = await _public_address(place.scheme, place.host, place.port)
                async with client.stream(
                    "GET",
                    place.copy_with(host=address),
                    headers={"Host": place.netloc.decode(), "Accept": "image/*", "Accept-Encoding": "identity"},
                    extensions={"sni_hostname": place.host},  # the certificate must be the name's, not the address's
                    follow_redirects=False,
                ) as response:
                    if response.has_redirect_location:
                        place = place.join(response.headers["location"])
                        continue
                    if response.status_code != 200:
                        raise UserError(f"the picture's address answered with status {response.status_code}")
                    return await _body(response.aiter_raw(), limits)
    except (httpx2.HTTPError, httpx2.InvalidURL, UnicodeError, ValueError) as error:
        raise UserError(f"the picture's address cannot be read ({type(error).__name__})") from None
    raise UserError(f"the picture's address redirects more than {MAX_REDIRECTS} times")


async def _body(chunks: Any, limits: Limits) -> bytes:
    data = bytearray()
    async for chunk in chunks:
        data += chunk
        if len(data) > limits.image_bytes:
            raise UserError(f"the picture behind the address has more than {limits.image_bytes:,} bytes")
    return bytes(data)


async def _public_address(scheme: str, host: str, port: int | None) -> str:
    """An address of `host`; UserError unless every one it has is public."""
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
    """Whether an IP address belongs to the internet at large, also where it wraps an IPv4 address in an IPv6 one."""
    ip = ipaddress.ip_address(address)
    if ip.version == 6:
        if ip in NAT64 or ip.teredo:
            return False
        ip = ip.ipv4_mapped or ip.sixtofour or ip
    return ip.is_global and not ip.is_multicast
