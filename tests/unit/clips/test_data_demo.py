"""The demo data: true captions, held-out layouts, the same bytes for a seed, never a half-built folder."""

import base64
import hashlib
import io
import json
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clips.common.errors import UserError
from clips.common.files import ensure_built
from clips.common.rundir import UNSEEN
from clips.config import DataConfig, Fields
from clips.data import artists, demo, painting
from clips.data.artists import ARTISTS, OPENMOJI, SIDE, Artist, drawings, fetch_sets
from clips.data.dataset import open_data
from clips.data.demo import (
    BACKGROUNDS,
    CONCEPTS,
    HANDS,
    IMAGE_SIZE,
    PLACES,
    WITH_ERRORS,
    Description,
    Scene,
    demo_split,
    ensure_demo,
    is_by_one,
    render,
    split_of,
    split_scene,
)
from clips.data.images import decode_image
from clips.data.sentences import split_sentences
from clips.data.splits import deciding_set, held_out_sets, open_split

SIZES = {"train": 16, "val": 6, "test": 6, UNSEEN: 6}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_demo(tmp_path_factory.mktemp("demo") / "data", sizes=SIZES)


@pytest.fixture(scope="module")
def training() -> list[tuple[Scene, Description]]:
    """The first scenes of training and what is said of them: some of nearly every thing on every ground."""
    return [split_scene("train", number, 0) for number in range(8_000)]


def contents(directory: Path) -> dict[str, str]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and ".clips" not in path.parts]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_what_is_written(built: Path) -> None:
    artists = json.loads((built / "manifest.json").read_text())["artists"]
    assert artists.keys() <= SIZES.keys()  # but for `unseen`, where nothing could be fetched: see below
    for split in artists:
        source = open_data(demo_split(built, split), Fields(), need_long=True)
        assert len(source) == SIZES[split]
        for i in range(SIZES[split]):
            sample = source.read(i)
            scene, description = split_scene(split, i, 0)
            assert np.asarray(decode_image(sample.image)).shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
            assert sample.web == description.web
            assert split_sentences(sample.long) == description.sentences == sample.extra["sentences"]
            assert [thing["concept"] for thing in sample.extra["objects"]] == [t.concept for t in scene.things]
            assert {thing["artist"] for thing in sample.extra["objects"]} <= set(artists[split])
            assert (WITH_ERRORS in sample.extra) == (split == "train")
            assert sample.extra.get("label") == (scene.things[0].concept if len(scene.things) == 1 else None)
    classes = json.loads((built / "concepts.json").read_text())
    assert classes["classes"] == list(CONCEPTS)
    assert len(classes["templates"]) == 8
    attribution = (built / "ATTRIBUTION.md").read_text()
    assert "CC BY-SA 4.0" in attribution
    assert "OpenMoji" in attribution


def test_captions_with_errors_are_read_in_training_and_not_in_tests(built: Path) -> None:
    fields = Fields(long=f"json:{WITH_ERRORS};{Fields().long}")
    for split in ("train", "val", "test"):
        erring = open_data(demo_split(built, split), fields, need_long=True)
        differ = [erring.read(i).long != " ".join(erring.read(i).extra["sentences"]) for i in range(SIZES[split])]
        assert any(differ) == (split == "train")


def test_the_same_seed_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    assert contents(ensure_demo(tmp_path / "again", sizes=SIZES)) == contents(built)
    other = ensure_demo(tmp_path / "other", sizes={"train": 2}, seed=1)
    first, of_another_seed = (open_data(demo_split(it, "train"), Fields(), need_long=True) for it in (built, other))
    assert [of_another_seed.read(i).long for i in range(2)] != [first.read(i).long for i in range(2)]


def test_the_demo_is_opened_by_its_name(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataConfig(train="demo", demo_dir=str(built))
    monkeypatch.setattr(demo.ensure_demo, "__kwdefaults__", demo.ensure_demo.__kwdefaults__ | {"sizes": SIZES})
    assert (len(open_split(data, "train", need_long=True)), len(open_split(data, "test", need_long=True))) == (16, 6)
    names = ["test"] if is_by_one(built) else ["test", UNSEEN]
    assert (held_out_sets(data), deciding_set(data)) == (names, names[-1])


def test_one_frame_builds_both_demos(tmp_path: Path) -> None:
    calls = []

    def write(work: Path) -> dict[str, str]:
        assert not list(work.iterdir())
        calls.append(work)
        (work / "data.txt").write_text(f"build {len(calls)}")
        return {"note": "for people"}

    def interrupted(work: Path) -> dict[str, str]:
        (work / "half.txt").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_built(tmp_path / "d", {}, interrupted, what="test data")
    assert not (tmp_path / "d").exists()
    (tmp_path / "d.partial").mkdir(exist_ok=True)  # as SIGKILL leaves it
    (tmp_path / "d.partial" / "half.txt").touch()

    def ensure(**changes: int) -> str:
        wanted = {"version": 1, "seed": 0} | changes
        return (ensure_built(tmp_path / "d", wanted, write, what="test data") / "data.txt").read_text()

    assert [ensure(), ensure(), ensure(seed=1), ensure(seed=1)] == ["build 1", "build 1", "build 2", "build 2"]
    assert not (tmp_path / "d.partial").exists()
    stamp = tmp_path / "d" / "manifest.json"
    assert json.loads(stamp.read_text()) == {"built": {"version": 1, "seed": 1}, "note": "for people"}
    with pytest.raises(UserError, match="holds no test data"):
        ensure(other=1)  # a folder of another kind of data, though it was built here
    stamp.write_text("[]")
    with pytest.raises(UserError, match="holds no test data"):
        ensure()
    assert (tmp_path / "d" / "data.txt").read_text() == "build 2"
    with pytest.raises(UserError, match="cannot be written"):
        ensure_built(stamp / "d", {"version": 1}, write, what="test data")


def test_test_layouts_never_occur_in_training(training: list[tuple[Scene, Description]]) -> None:
    scenes = {split: [split_scene(split, i, 0)[0] for i in range(n)] for split, n in (("val", 500), ("test", 500))}
    scenes["train"] = [scene for scene, _ in training]
    labels = Counter(scene.things[0].concept for scene in scenes["test"] if len(scene.things) == 1)
    assert labels.keys() == CONCEPTS.keys(), "every concept is tested, equally often"
    assert (min(labels.values()), max(labels.values()), len(CONCEPTS)) == (7, 8, 32)
    layouts, single = {}, {}
    for split, drawn in scenes.items():
        several = [scene for scene in drawn if len(scene.things) > 1]
        layouts[split] = {frozenset((t.concept, t.place) for t in scene.things) for scene in several}
        ones = [(scene.things[0], scene.background) for scene in drawn if len(scene.things) == 1]
        single[split] = {(thing.concept, thing.place, background) for thing, background in ones}
        assert all(split_of(scene) == split for scene in drawn)
    for kept in (layouts, single):
        assert not kept["train"] & kept["test"]
        assert not kept["train"] & kept["val"]
        assert not kept["val"] & kept["test"]


def test_the_unseen_artist_draws_the_test_scenes() -> None:
    """So that two columns differ by the artist alone; validation has scenes and an artist of its own."""
    assert [split_scene(UNSEEN, i, 0) for i in range(100)] == [split_scene("test", i, 0) for i in range(100)]
    assert set(HANDS["train"]) == set(HANDS["test"])
    trained, tuned, decides = (set(HANDS[split]) for split in ("train", "val", UNSEEN))
    assert not trained & tuned
    assert not trained & decides
    assert not tuned & decides


def test_scenes_show_what_they_say() -> None:
    """Against the pixels: the ground's colour, and something drawn at each place and nowhere else."""
    drawing = np.asarray(demo._drawings(OPENMOJI)["star"].convert("RGBA"))
    assert drawing.shape == (SIDE, SIDE, 4)
    for number in range(40):
        scene, _ = split_scene("train", number, 0)
        pixels = np.asarray(decode_image(render(scene, [OPENMOJI] * len(scene.things)))).astype(int)
        ground = np.asarray(decode_image(render(replace(scene, things=()), []))).astype(int)
        assert np.abs(np.array(scene.ground.colour) - BACKGROUNDS[scene.background]).max() <= demo.COLOUR_JITTER
        if scene.ground.second == scene.ground.colour:
            distances = {name: np.abs(ground.mean((0, 1)) - c).sum() for name, c in BACKGROUNDS.items()}
            assert min(distances, key=distances.__getitem__) == scene.background
        else:
            even = np.asarray(
                painting.paint_ground(replace(scene.ground, contrast=0.0, shade=(0.0, 0.0)), scene.image_size)
            )
            first, second = (np.abs(even.astype(int) - c).sum(-1) for c in (scene.ground.colour, scene.ground.second))
            assert 0.55 < (first < second).mean() < 1, "the named colour covers most, another one some"
        assert ground.std((0, 1)).max() > 1  # painted, not plain
        drawn = (np.abs(pixels - ground) > 24).any(-1)  # a JPEG's edges ring
        near = np.zeros_like(drawn)
        for thing in scene.things:
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= IMAGE_SIZE
            assert 0 <= top < bottom <= IMAGE_SIZE
            assert drawn[top:bottom, left:right].mean() > 0.05
            margin = (right - left) // 5 + 8  # a drawing that is turned may reach over its square
            near[max(0, top - margin) : bottom + margin, max(0, left - margin) : right + margin] = True
            x, y = (left + right) / 2 / IMAGE_SIZE, (top + bottom) / 2 / IMAGE_SIZE
            assert thing.place == min(
                PLACES, key=lambda place, x=x, y=y: np.hypot(x - PLACES[place][0], y - PLACES[place][1])
            )
        assert not drawn[~near].any()


def test_the_demo_is_what_it_was() -> None:
    """Its pictures are decided by these texts and numbers, and by the ground's coordinates."""
    digest = hashlib.sha256()
    for split in ("train", "val", "test"):
        for number in range(100):
            scene, description = split_scene(split, number, 0)
            digest.update(json.dumps(demo.truth(scene, description, [OPENMOJI] * len(scene.things))).encode())
    assert digest.hexdigest() == "3c9fbb4ff3948676038fb46cb381938581740f92d8354695c368b4db86bd662c"
    middle = (np.arange(120, dtype=np.float32) + 0.5) / 120 - 0.5
    x, y = painting._grid(120)
    assert np.array_equal(x, np.broadcast_to(middle, (120, 120)))
    assert np.array_equal(y, x.T)


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


def test_what_npm_brings_counts_when_it_is_what_is_pinned(own_cache, tmp_path, monkeypatch):
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


def test_what_is_not_pinned_does_not_count_and_why_nothing_came_is_said(own_cache, tmp_path, monkeypatch):
    pin(monkeypatch, package({"icons": {}}))
    for does, reason in (
        ("sys.exit('npm error code EAI_AGAIN')", "npm cannot fetch them: npm error code EAI_AGAIN"),
        ("Path('me-mine-1.0.0.tgz').write_bytes(b'other')", "npm brought other files than the pinned ones: @me/mine"),
    ):
        npm_that(tmp_path, monkeypatch, does)
        assert fetch_sets(["mine"]).startswith(reason)
        with pytest.raises(UserError, match="the drawings of Mine are not in"):
            drawings("mine", {"dog": "dog_face"})
