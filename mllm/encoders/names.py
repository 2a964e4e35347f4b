"""What vision encoders are called: KIND or KIND:ARGUMENT. Nothing heavy is imported, so that a name costs nothing."""

from __future__ import annotations

from pathlib import Path

from clips.common.errors import UserError

ARGUMENTS: dict[str, str | None] = {
    "clips": None,
    "clip": None,
    "caption": None,
    "caption+web": None,
    "random": None,
    "blind": None,
    "open_clip": "MODEL/PRETRAINED",
    "hf": "ID_OR_DIR",
    "timm": "NAME",
}
"""Kind (mllm/encoders/registry.py loads each) → the argument that it needs, None where it can stand alone."""


def parse_vision_name(name: str) -> tuple[str, str]:
    """(kind, argument) of an encoder's name; UserError for a kind that is not known and for a missing argument.

    A hub id or a directory alone, as LLaVA's commands give it, is of kind `hf`.
    """
    key, colon, argument = name.partition(":")
    if key not in ARGUMENTS and not colon and "/" in name:
        if (Path(name) / "export").is_dir():
            raise UserError(f"vision encoder {name} is a run of this project: clips:{name}, or clip:{name}")
        key, argument = "hf", name
    if key not in ARGUMENTS:
        raise UserError(
            f"vision encoder {name!r} is not known; known are: {', '.join(ARGUMENTS)} (with :ARGUMENT), and owner/name "
            "for hf:owner/name"
        )
    if ARGUMENTS[key] and not argument:
        raise UserError(f"vision encoder {key} needs an argument: {key}:{ARGUMENTS[key]}")
    return key, argument
