"""What an installation that is no link to this folder holds: the templates, too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

FIND = """
from importlib.resources import files
import sys
for package in sys.argv[1:]:
    for found in files(package).joinpath("templates").iterdir():
        print(f"{package}/{found.name}")
"""


def test_every_template_is_installed(tmp_path: Path) -> None:
    for part in ("clips", "mllm"):
        shutil.copytree(ROOT / part, tmp_path / "source" / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    build = ["-c", "from setuptools import setup; setup()", "-q", "build_py", "--build-lib", tmp_path / "lib"]
    subprocess.run([sys.executable, *build], cwd=tmp_path / "source", check=True, capture_output=True, timeout=300)
    templates = sorted((ROOT / "clips").rglob("templates/*")) + sorted((ROOT / "mllm").rglob("templates/*"))
    wanted = {f"{'.'.join(path.parts[len(ROOT.parts) : -2])}/{path.name}" for path in templates}
    assert len(wanted) >= 9
    packages = sorted({name.partition("/")[0] for name in wanted})
    found = subprocess.run(
        [sys.executable, "-c", FIND, *packages], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "lib")},
        check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert set(found.stdout.split()) == wanted
