"""The parser of every command: no abbreviations, flags with dashes, each default printed exactly once.

A command builds a `Parser` and adds flags with `add_argument`, or adds all fields of a dataclass with `add_options`.
`from_dict` builds a dataclass from JSON, and `assign` changes a field of JSON, with errors that name the field.
"""

import argparse
import dataclasses
import difflib
import math
import operator
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from clips.common.errors import UserError

T = TypeVar("T")
SET: dict[str, Any] = {"nargs": "+", "action": "extend", "default": [], "metavar": "FIELD=VALUE"}
"""Arguments of the flag `--set`, by which many commands set fields of clips/config.py."""
BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}
"""Comparison of a number with each kind of bound that a field may declare."""
RETIRED: dict[str, Any] = {
    **{"contrastive_weight": 1.0, "keep_every": 0, "splitter": "smart"},
    **{"web": True, "sizes": [], "by_aspect": False, "demo_aspects": False},
}
"""Fields of earlier configurations. They still load if they have this value, because it is what the program does."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that accepts only full flag names and prints `(default: …)` once for each flag.

    A help text that names its default itself, as in `(default: the newest run)`, is printed as it is. The words of a
    flag may be joined by dashes or by underscores: `--report_to` is `--report-to`. An unknown flag ends the command
    with exit code 2, and the message names the most similar flag. A float must be finite. `--version` prints the
    version, unless the command has another flag of that name.
    """

    def __init__(self, description: str | None, **options: Any) -> None:
        super().__init__(description=description, formatter_class=_Formatter, allow_abbrev=False, **options)
        self.register("type", float, _finite)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse `args` (default: sys.argv), where a flag may have `_` for `-` and the other way round."""
        if "--version" not in self._option_string_actions:  # which is the format of conversations in train_llava.sh
            self.add_argument("--version", action=_Version, help="print the version and exit")
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._as_known(word) for word in words], namespace)

    def _as_known(self, word: str) -> str:
        name, equals, value = word.partition("=")
        if name.startswith("--") and name not in self._option_string_actions:
            for spelling in (name.replace("_", "-"), "--" + name[2:].replace("-", "_")):
                if spelling in self._option_string_actions:
                    return spelling + equals + value
        return word

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and `message`, with the most similar flag if one is misspelt."""
        known = set(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                known.update(*(study._option_string_actions for study in action.choices.values()))
        for word in re.findall(r"(?<!\S)--[\w.-]+", message):
            nearest = difflib.get_close_matches(word, known, n=1)
            if nearest and word not in known:
                message += f"\n{word}: did you mean {nearest[0]}?"
        super().error(message)


class _Version(argparse.Action):
    """Prints the version of this package, which is read only then."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"clips-mllm {version('clips-mllm')}")
        except PackageNotFoundError:
            print("clips-mllm, not installed: a checkout without pip install -e .")
        parser.exit()


class _Formatter(argparse.HelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        is_given = action.required or (not action.option_strings and default is None)
        if is_given or default is argparse.SUPPRESS or "(default:" in text:
            return text
        if action.nargs == 0:
            words = "no"
        elif isinstance(default, (list, tuple)):
            words = " ".join(map(str, default)) or "none"
        else:
            words = "none" if default is None or default == "" else str(default)
        return f"{text} (default: {words.replace('%', '%%')})"


def option(
    default: Any, text: str, *aliases: str, underscores: bool = False, bounds: Mapping[str, float] | None = None,
    group: str = "", **argument: Any,
) -> Any:  # fmt: skip
    """Return a dataclass field that `add_options` turns into a flag.

    `text` is the flag's help, and `aliases` are further names. `underscores` keeps the field's name as the flag's name
    and lets a bool take a value, as LLaVA's scripts do. `bounds` are as in `bounded`. `group` is the heading in
    `--help` of this flag and those that follow. `argument` goes to `add_argument`, for example `metavar`.
    """
    metadata = {"help": text, "aliases": aliases, "underscores": underscores, "argument": argument, "group": group}
    return dataclasses.field(default=default, metadata=metadata | {"bounds": bounds or {}})


def bounded(default: Any = dataclasses.MISSING, **bounds: float) -> Any:
    """Return a dataclass field whose numbers `check_fields` keeps within `bounds`, named as in BOUNDS."""
    return dataclasses.field(default=default, metadata={"bounds": bounds})


def check_fields(config: Any, prefix: str) -> None:
    """Raise UserError for a field of a dataclass that is not one of its choices, not finite, or out of its bounds.

    `prefix` and the field's name begin the message. None is not checked.
    """
    hints = get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value, name = getattr(config, f.name), f"{prefix}{f.name}"
        if value is None:
            continue
        if get_origin(hints[f.name]) is Literal:
            check_choice(name, value, hints[f.name])
        bounds = f.metadata.get("bounds", {})
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{name} {number} must be a finite number")
            if not all(BOUNDS[kind](number, bound) for kind, bound in bounds.items()):
                words = " and ".join(f"{kind.replace('_', ' ')} {bound}" for kind, bound in bounds.items())
                raise UserError(f"{name} {number} must be {words}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise UserError unless `value` is one of `choices`, a Literal type."""
    known = get_args(choices)
    if value not in known:
        raise UserError(f"{name} = {value!r} is not known; choose one of: {', '.join(map(str, known))}")


def add_options(parser: argparse._ActionsContainer, kind: type, prefix: str = "") -> None:
    """Add one flag for each `option` of the dataclass `kind`: `prefix` and the field's name, with dashes.

    The field's type gives the flag's type. Literal gives choices, and a tuple takes several words. A bool is a switch:
    `--no-FIELD` if its default is True.
    """
    hints, group = get_type_hints(kind), parser
    for f in dataclasses.fields(kind):
        if "help" not in f.metadata:
            continue
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        name, text = prefix + f.name, f.metadata["help"]
        if not f.metadata["underscores"]:
            name = name.replace("_", "-")
        argument = _argument(hints[f.name], f.default, valued=f.metadata["underscores"])
        if argument.get("action") == "store_false":
            name = f"no-{name}"
        names = (f"--{name}", *f.metadata["aliases"])
        argument |= f.metadata["argument"]
        group.add_argument(*names, dest=prefix + f.name, default=f.default, help=text, **argument)


def _argument(hint: Any, default: Any, *, valued: bool) -> dict[str, Any]:
    """Return the arguments of `add_argument` for a field of this type."""
    if get_origin(hint) in (Union, types.UnionType):  # X | None
        (hint,) = (kind for kind in get_args(hint) if kind is not type(None))
    if hint is bool:
        if valued or default is None:
            return {"type": boolean, "nargs": "?", "const": True}
        return {"action": "store_false" if default else "store_true"}
    if get_origin(hint) is Literal:
        return {"type": type(get_args(hint)[0]), "choices": get_args(hint)}
    if get_origin(hint) is tuple:
        return {"type": get_args(hint)[0], "nargs": "+", "action": _Extend}
    return {"type": hint}


class _Extend(argparse.Action):
    """Collects the words of a repeated flag in a tuple; the first one replaces the default."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, (*(() if before is self.default else before), *values))


def boolean(text: str) -> bool:
    """Return the value of a word such as True or False, as LLaVA's scripts take it, else raise ArgumentTypeError."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "1", "yes")


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text} must be a finite number")
    return float(text)


def share(text: str) -> float:
    """Return `text` as a number from 0 to 1, else raise ArgumentTypeError."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be a share from 0 to 1")
    return float(text)


def at_least(least: int) -> Callable[[str], int]:
    """Return the argparse type of integers of at least `least`."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} must be at least {least}")
        return int(text)

    return number


def from_flags(kind: type[T], flags: argparse.Namespace, prefix: str = "", **others: Any) -> T:
    """Return the dataclass `kind` with the values of its flags; `others` are fields without a flag, or override one."""
    names = [f.name for f in dataclasses.fields(kind) if "help" in f.metadata]  # type: ignore[arg-type]
    return kind(**{name: getattr(flags, prefix + name) for name in names} | others)


def given(parser: argparse.ArgumentParser, words: Sequence[str]) -> set[str]:
    """Return the names of the values that the command line `words` sets itself, without those left at their default."""
    unset = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([]))))
    return {name for name, value in vars(parser.parse_args(words, unset)).items() if value is not None}


# ------------------------------------------------------------------------------------------- dataclasses from JSON
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
    origin = get_origin(cls)
    if origin in (Union, types.UnionType):
        options = get_args(cls)
        return None if value is None else from_dict(options[0], value, where)
    if origin is tuple:
        require(isinstance(value, (list, tuple)), f"{where} must be a list, found {value!r}")
        kinds = get_args(cls)
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
        hints = get_type_hints(cls)
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
