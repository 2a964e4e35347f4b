"""The sets of drawings: every thing has enough hands, only pinned bytes count, and without npm one artist draws all."""

import base64
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from clips.common.errors import UserError
from clips.data import artists
from clips.data.artists import ARTISTS, OPENMOJI, SIDE, Artist, drawings, fetch_sets


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIPS_MLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "artists"


def package(icons: dict[str, object]) -> bytes:
    """A tarball such as npm's, with a set of drawings in it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        content = json.dumps({"prefix": "mine", "width": 10, "height": 10, **icons}).encode()
        info = tarfile.TarInfo(artists.ICONS)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def pin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> Artist:
    """A set "mine" whose package is `content`."""
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    mine = Artist("Mine", "me", "MIT", "licence", "source", "@me/mine", "1.0.0", digest)
    monkeypatch.setitem(ARTISTS, "mine", mine)
    return mine


def npm_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    """A program named npm, alone on the PATH."""
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\n{does}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))


def test_what_npm_brings_counts_when_it_is_what_is_pinned(cache, tmp_path, monkeypatch):
    content = package({"icons": {"dog-face": {"body": '<rect width="10" height="5" fill="red"/>'}}})
    mine = pin(monkeypatch, content)
    log = tmp_path / "log"
    name = mine.tarball.name
    npm_that(tmp_path, monkeypatch, f"Path({str(log)!r}).write_text(' '.join(sys.argv[1:]))\n"
             f"Path({name!r}).write_bytes({content!r})")  # fmt: skip
    assert fetch_sets(["mine"]) == ""
    assert log.read_text().startswith("pack --ignore-scripts ")
    assert log.read_text().endswith(" @me/mine@1.0.0")
    log.unlink()
    assert fetch_sets(["mine", OPENMOJI]) == ""
    assert not log.exists()  # it is there: npm is not asked again
    drawn = drawings("mine", {"dog": "dog_face", "cat": "cat_face"})
    assert drawn.keys() == {"dog"}
    assert np.asarray(drawn["dog"])[SIDE // 2, SIDE // 2].tolist() == [255, 0, 0, 255]
    mine.tarball.write_bytes(content[:-1])  # damaged since: fetched again
    assert fetch_sets(["mine"]) == ""
    assert mine.tarball.read_bytes() == content


def test_what_is_not_pinned_does_not_count_and_why_nothing_came_is_said(cache, tmp_path, monkeypatch):
    pin(monkeypatch, package({"icons": {}}))
    for does, reason in (
        ("sys.exit('npm error code EAI_AGAIN')", "npm cannot fetch them: npm error code EAI_AGAIN"),
        ("Path('me-mine-1.0.0.tgz').write_bytes(b'other')", "npm brought other files than the pinned ones: @me/mine"),
    ):
        npm_that(tmp_path, monkeypatch, does)
        assert fetch_sets(["mine"]).startswith(reason)
        with pytest.raises(UserError, match="the drawings of Mine are not in"):
            drawings("mine", {"dog": "dog_face"})
