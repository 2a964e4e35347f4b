"""Build dataclasses from JSON, and change single fields of JSON, with errors that name the field."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

from clips.common.errors import UserError
from clips.common.flags import check_choice

RETIRED: dict[str, Any] = {
    **{"contrastive_weight": 1.0, "keep_every": 0, "splitter": "smart"},
    **{"web": True, "sizes": [], "by_aspect": False, "demo_aspects": False},
}
"""Fields of earlier configurations. They still load if they have this value, because it is what the program does."""


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def assign(tree: Any, keys: list[str], value: Any, path: str) -> None:
    """Set the field `keys` of the JSON `tree` in place; `*` stands for every item of a list.

    Raises UserError, which shows `path`, if there is no such field.
    """
    key, *rest = keys
    known = [str(index) for index in range(len(tree))] if isinstance(tree, list) else []
    known = list(tree) if isinstance(tree, dict) else known
    is_every = key == "*" and isinstance(tree, list)
    require(is_every or key in known, f"--set {path}: no field {key!r}; known here: {', '.join(known) or 'none'}")
    for name in known if is_every else [key]:
        place = int(name) if isinstance(tree, list) else name
        if rest:
            assign(tree[place], rest, value, path)
        else:
            tree[place] = value


def from_dict(cls: Any, value: Any, where: str = "config") -> Any:
    """Build dataclass `cls` from JSON `value`. Raises UserError for unknown, missing and ill-typed fields."""
    # pydantic's TypeAdapter does not name the known fields, and adding them makes it as long as this.
    origin = typing.get_origin(cls)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(cls)
        return None if value is None else from_dict(options[0], value, where)
    if origin is tuple:
        require(isinstance(value, (list, tuple)), f"{where} must be a list, found {value!r}")
        kinds = typing.get_args(cls)
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        require(len(value) == len(kinds), f"{where} must have {len(kinds)} items, found {len(value)}")
        pairs = zip(kinds, value, strict=True)
        return tuple(from_dict(kind, item, f"{where}.{i}") for i, (kind, item) in enumerate(pairs))
    if origin is Literal:
        check_choice(where, value, cls)
        return value
    if isinstance(cls, type) and dataclasses.is_dataclass(cls):
        require(isinstance(value, dict), f"{where} must be an object, found {value!r}")
        hints = typing.get_type_hints(cls)
        retired = {name for name in value.keys() & RETIRED.keys() - hints.keys() if value[name] == RETIRED[name]}
        fields = {name: item for name, item in value.items() if name not in retired}
        unknown = sorted(fields.keys() - hints.keys())
        require(not unknown, f"{where} has unknown fields: {', '.join(unknown)}; known: {', '.join(hints)}")
        try:
            return cls(**{name: from_dict(hints[name], item, f"{where}.{name}") for name, item in fields.items()})
        except TypeError as error:  # of the dataclass: it names the fields that are missing
            raise UserError(f"{where} is incomplete: {error}") from None
    if cls is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    fits = isinstance(value, cls) and (cls is bool or not isinstance(value, bool))
    require(fits, f"{where} must be {cls.__name__}, found {value!r}")
    return value
