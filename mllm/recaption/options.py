"""The settings of a recaptioning; every process of one folder has the same."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from clips import Fields
from clips.common.errors import UserError
from mllm.recaption.asking import Prompt
from mllm.recaption.quality import Bounds
from mllm.recaption.shards import PAIRS

DEMO = Path("data/demo")
"""The data if none are named: the pairs of pretraining's demo, without the conversations made of them."""


@dataclass(frozen=True)
class Options:
    """The flags of scripts/recaption.py by name. Raises UserError if a value is out of range."""

    data: str
    output: Path
    captioner: str
    prompt: Prompt
    fields: Fields = PAIRS
    image_root: str | None = None
    shards: int | None = None
    batch_size: int = 32
    max_new_tokens: int = 256
    in_flight: int = 32
    words: tuple[int, int] = (5, 400)
    script: str = "Latin"
    on_bad: Literal["drop", "keep"] = "drop"
    min_similarity_quantile: float | None = None
    similarity_encoder: str | None = None
    max_broken_share: float = 0.05
    cache_gb: float = 50.0
    device: str = "auto"

    def __post_init__(self) -> None:
        if (self.min_similarity_quantile is None) != (self.similarity_encoder is None):
            raise UserError(
                "--min-similarity-quantile and --similarity-encoder go together: the share of pairs to leave out, and "
                "the encoder that says how well a caption fits its picture"
            )
        quantile = self.min_similarity_quantile
        for name, value, fits, must in (
            ("--shards", self.shards, self.shards is None or self.shards > 0, "at least 1"),
            ("--batch-size", self.batch_size, self.batch_size > 0, "at least 1"),
            ("--in-flight", self.in_flight, self.in_flight > 0, "at least 1"),
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens > 0, "at least 1"),
            ("--min-similarity-quantile", quantile, quantile is None or 0 < quantile < 1, "between 0 and 1"),
            ("--max-broken-share", self.max_broken_share, 0 <= self.max_broken_share <= 1, "from 0 to 1"),
        ):
            if not fits:
                raise UserError(f"{name} {value} must be {must}")
        least, most = self.words
        if not 0 <= least <= most:
            raise UserError(f"--words {least} {most} must be the least and the most")

    @classmethod
    def from_flags(cls, flags: argparse.Namespace, **others: Any) -> Options:
        """`others`: the settings that are not the flag's own value."""
        return cls(**{field.name: getattr(flags, field.name) for field in fields(cls)} | others)

    @property
    def bounds(self) -> Bounds:
        return Bounds(*self.words, self.script)

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
            "min_similarity_quantile": self.min_similarity_quantile,
            "similarity_encoder": self.similarity_encoder,
        }
