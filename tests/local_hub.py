"""A folder that stands in for the Hugging Face hub: laid out as its cache, from which the stock libraries load."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import run_python
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

REPO = "somebody/tiny-model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the layout of the hub's cache, and the two calls of the hub's client that fill it."""

    def create_repo(self: HfApi, repo_id: str, *, private: bool | None, exist_ok: bool) -> str:
        (tmp_path / "asked.json").write_text(json.dumps({"private": private, "exist_ok": exist_ok}))
        return f"https://hub/{repo_id}"

    def upload_folder(
        self: HfApi, *, repo_id: str, folder_path: str, allow_patterns: list[str], **options: object
    ) -> None:
        repo = tmp_path / "cache" / f"models--{repo_id.replace('/', '--')}"
        names = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            target = repo / "snapshots" / ("0" * 40) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path, name), target)
        (repo / ".no_exist" / ("0" * 40)).mkdir(parents=True)
        if not Path(folder_path, "config.json").exists():  # as the client remembers what the hub does not have
            (repo / ".no_exist" / ("0" * 40) / "config.json").touch()
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("0" * 40)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_real_one")

    return tmp_path


def uploaded(hub: Path) -> Path:
    """The files of REPO."""
    return hub / "cache" / f"models--{REPO.replace('/', '--')}" / "snapshots" / ("0" * 40)


# A process of its own: libraries read the place of the hub's cache when they are imported.
_RUN = "import sys; sys.modules['clips'] = sys.modules['mllm'] = None; exec(open('card.py').read()); print('done')"


def run_card(hub: Path) -> None:
    """Run the code of REPO's card, elsewhere, without this project."""
    card = (uploaded(hub) / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", card, flags=re.DOTALL | re.MULTILINE)
    assert REPO in block
    (hub / "elsewhere").mkdir()
    (hub / "elsewhere" / "card.py").write_text(block)
    Image.new("RGB", (40, 30), "red").save(hub / "elsewhere" / "picture.png")
    offline = {"HF_HUB_CACHE": str(hub / "cache"), "HF_HUB_OFFLINE": "1"}
    done = run_python("-c", _RUN, cwd=hub / "elsewhere", env=offline)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("done\n")
