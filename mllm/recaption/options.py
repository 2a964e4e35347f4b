"""The settings of a recaptioning, which are flags of scripts/recaption.py; nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clips import Fields
from clips.common.errors import UserError
from clips.common.flags import option
from mllm.recaption.asking import Prompt

DEMO = Path("data/demo")
"""The data if none are named: the pairs of pretraining's demo, without the conversations made of them."""
DEFAULT = Path("runs/recaption")


@dataclass(frozen=True)
class Bounds:
    """The limits of a good caption."""

    least_words: int = 5
    most_words: int = 400
    script: str = "Latin"
    """Unicode's name of the script of most letters; "any" for no check."""


@dataclass(frozen=True)
class Options:
    """Every process of one folder has the same options. Raises UserError if a value is out of range."""

    data: str = option("", "pairs: a folder, pattern or URL of tar shards, or tables (default: the demo's)")
    output: Path = option(DEFAULT, "folder for the shards with long captions")
    captioner: str = option(
        "",
        "llava:DIR, hf:ID_OR_DIR, endpoint:URL[,URL] or clips:RUN (default, on the demo alone: the newest llava and "
        "the newest clips of runs/, each into a folder below --output)",
        metavar="KIND:NAME",
    )
    prompt: Prompt = field(default_factory=Prompt)
    fields: Fields = field(default_factory=Fields)
    image_root: str | None = option(None, "tables: the folder of relative image paths")
    shards: int | None = option(None, "caption only the first so many shards (default: all, one of the demo)")
    batch_size: int = option(32, "pairs that a model reads at once")
    max_new_tokens: int = option(256, "longest caption, in tokens")
    in_flight: int = option(32, "endpoint: requests that a server gets at once")
    words: tuple[int, ...] = option(
        (5, 400), "least and most words of a good caption", nargs=2, metavar=("LEAST", "MOST")
    )
    script: str = option("Latin", "script of most letters of a good caption, by Unicode's name; any: no check")
    on_bad: Literal["drop", "keep"] = option("drop", "drop or keep a pair whose second caption is bad too")
    max_broken_share: float = option(0.05, "largest share of broken pairs; more end the command")
    cache_gb: float = option(50.0, "disk space for copies of remote data; 0: no copies")
    device: str = option("auto", "auto, cpu or cuda")

    def __post_init__(self) -> None:
        for name in ("shards", "batch_size", "in_flight", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if not 0 <= self.max_broken_share <= 1:
            raise UserError(f"--max-broken-share {self.max_broken_share} must be from 0 to 1")
        least, most = self.words
        if not 0 <= least <= most:
            raise UserError(f"--words {least} {most} must be the least and the most")

    @property
    def bounds(self) -> Bounds:
        least, most = self.words
        return Bounds(least, most, self.script)

    def captioning(self) -> dict[str, Any]:
        """The keyword arguments of `make_captioner`."""
        return {name: getattr(self, name) for name in ("device", "batch_size", "max_new_tokens", "in_flight")}

    def settings(self) -> dict[str, Any]:
        """The settings that captions depend on, beside captioner and data: recaption.json holds them."""
        return {
            "prompt": self.prompt.template,
            "fields": {"image": self.fields.image, "web": self.fields.web},
            "bounds": vars(self.bounds),
            "on_bad": self.on_bad,
        }
