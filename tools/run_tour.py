#!/usr/bin/env python
"""Run docs/tour.ipynb in the current directory, after the quickstart, and store it with its outputs."""

from __future__ import annotations

import argparse
import base64
import io
import sys
from pathlib import Path

from clips.common.errors import run_command
from clips.common.flags import Parser

TOUR = Path(__file__).resolve().parents[1] / "docs" / "tour.ipynb"
SIDE, COLOURS = 200, 64
"""Longest side of a stored picture in pixels, and its colours."""


def run_tour(notebook: Path, folder: Path) -> None:
    """Execute `notebook` from a fresh kernel in `folder`; pictures of its outputs are made small."""
    import nbformat
    from nbclient import NotebookClient
    from PIL import Image

    tour = nbformat.read(notebook, as_version=4)
    NotebookClient(tour, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in tour.cells:
        cell.metadata.pop("execution", None)  # times
        kept = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
        for data in (output["data"] for output in kept if "image/png" in output.get("data", {})):
            picture, out = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB"), io.BytesIO()
            picture.thumbnail((SIDE, SIDE))
            picture.quantize(COLOURS).save(out, "PNG", optimize=True)
            data["image/png"] = base64.b64encode(out.getvalue()).decode()
            data.pop("image/jpeg", None)
        if cell.cell_type == "code":
            cell.outputs = kept
    tour.metadata.get("language_info", {}).pop("version", None)
    nbformat.write(tour, notebook)


def parser() -> argparse.ArgumentParser:
    p = Parser(__doc__)
    p.add_argument("--notebook", type=Path, default=TOUR, help="the notebook, which is replaced")
    return p


if __name__ == "__main__":
    sys.exit(run_command(lambda: run_tour(parser().parse_args().notebook, Path.cwd())))
