"""The raw records of a LLaVA file, as JSON has them. Imports nothing heavy: a count of them waits for no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clips.common.errors import UserError


def read_json_records(path: Path) -> list[Any]:
    """The raw records of a .json list or a .jsonl file; UserError where it is neither."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data file {path} cannot be read: {error}; give a LLaVA JSON or JSONL file") from None
    if path.suffix == ".jsonl":
        records = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                records += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise UserError(f"{path} line {number} is not JSON: {error}") from None
    else:
        try:
            records = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error} (one record a line? then name it .jsonl)") from None
    if not isinstance(records, list) or not records:
        raise UserError(f"{path} must hold a list of records that is not empty")
    return records
