"""The documentation builds as a site without a warning, and the README is a page of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(build, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    pages = [path for path in (ROOT / "docs").glob("*.md") if path.name != "index.md"]
    assert [path.stem for path in pages if not (site / path.stem / "index.html").is_file()] == []
    readme = (site / "overview" / "index.html").read_text(encoding="utf-8")
    assert 'href="../training/"' in readme
    assert 'class="language-bash' in readme, "site.css wraps commands, which were cut"
    assert (site / "site.css").is_file()
    assert (site / "search" / "search_index.json").is_file()
    outside = re.findall(r'(?:src|href)="(https?://[^"]*\.(?:js|css|woff2?))"', readme)
    assert outside == [], "a reader's browser asks other servers"
    # The theme's script fetches Mermaid from unpkg.com for a page that has a diagram of it.
    assert [path for path in site.rglob("*.html") if 'class="mermaid"' in path.read_text(encoding="utf-8")] == []
