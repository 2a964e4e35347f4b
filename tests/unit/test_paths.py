"""The ground floor's small helpers: the cache folder, paths below a root, a hash over files."""

import hashlib
from pathlib import Path

import pytest

from clips.common.hub import model_digest
from clips.common.paths import inside, is_plain


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    (root / "pics").mkdir(parents=True)
    (root / "pics" / "0.png").touch()
    (tmp_path / "set-2").mkdir()
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "loop").symlink_to(root / "loop")
    (root / "up").symlink_to(tmp_path)
    (root / "in.png").symlink_to(root / "pics" / "0.png")
    return root


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "pics/../../secret.png", "out.png", "up/secret.png", "../set-2/a.png", "a\0b", "x://a"]
)
def test_what_leads_out_is_refused(root: Path, name: str) -> None:
    with pytest.raises(ValueError, match="leads out of"):
        inside(root, name)
    assert is_plain(name) == (name in ("out.png", "up/secret.png", "x://a")), "by the text alone"


def test_what_stays_below_is_its_real_path(root: Path) -> None:
    real = str((root / "pics" / "0.png").resolve())
    for name in ("pics/0.png", "in.png", "./pics//0.png", "pics/../pics/0.png", str(root / "pics" / "0.png")):
        assert inside(root, name) == real
    assert inside(root, "new/a..png") == str(root.resolve() / "new" / "a..png"), "what is not there yet too"
    assert inside(root / "up" / "set", "pics/0.png") == real, "the root may be a link itself"
    assert inside("/", "etc/hosts") == str(Path("/etc/hosts").resolve())


def test_a_digest_is_of_the_names_and_contents_of_weights(tmp_path: Path) -> None:
    """Figures and manifests of older runs hold such digests."""
    a = tmp_path / "a.safetensors"
    b = tmp_path / "b.safetensors"
    for path in (b, a):
        path.write_text(f"content of {path.name}")
    lines = "".join(f"{p.name} {hashlib.sha256(p.read_bytes()).hexdigest()}\n" for p in (a, b))
    digest = model_digest(tmp_path)
    assert digest == hashlib.sha256(lines.encode()).hexdigest()
    whole = model_digest(tmp_path, whole=True)
    (tmp_path / "config.json").write_text("{}")
    assert model_digest(tmp_path) == digest
    assert model_digest(tmp_path, whole=True) != whole
    b.rename(tmp_path / "c.safetensors")
    assert model_digest(tmp_path) != digest
