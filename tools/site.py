"""mkdocs' hooks: README, CONTRIBUTING and CHANGELOG are pages of the site too, and links lead to pages of the site.

A link to a file that is no page, such as a script, is shown as the file's name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ABOVE = {"README.md": "overview.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""File above docs/ → its page; mkdocs takes a README for an index."""


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for name, page in ABOVE.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    folder = ROOT if page.file.src_uri in ABOVE.values() else ROOT / "docs"

    def link(found: re.Match[str]) -> str:
        words, place, anchor = found[1], found[2], found[3] or ""
        path = (folder / place).resolve()
        if path.is_relative_to(ROOT / "docs"):
            return f"{words}({path.relative_to(ROOT / 'docs').as_posix()}{anchor})"
        name = path.relative_to(ROOT).as_posix()
        return f"{words}({ABOVE[name]}{anchor})" if name in ABOVE else f"{words[1:-1]} (`{name}`)"

    return re.sub(r"(\[[^\]]*\])\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)", link, markdown)
