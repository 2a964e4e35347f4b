"""What a recaptioning is asked for: the same for all of its processes."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clips import Fields, demo_split, parse_fields
from clips.common.errors import UserError
from mllm.recaption.asking import Prompt
from mllm.recaption.quality import Bounds
from mllm.recaption.shards import PAIRS

OnBad = Literal["drop", "keep"]
DEMO = Path("data/demo")
"""The pairs that are captioned where no data are named: pretraining's demo, not the conversations made of it."""


@dataclass(frozen=True)
class Options:
    data: str
    out: Path
    captioner: str
    prompt: Prompt
    fields: Fields = PAIRS
    image_root: str | None = None
    shards: int | None = None
    """Only the first so many."""
    batch_size: int = 32
    max_new_tokens: int = 256
    in_flight: int = 32
    """Requests that an endpoint's server gets at once."""
    bounds: Bounds = field(default_factory=Bounds)
    on_bad: OnBad = "drop"
    min_similarity_quantile: float | None = None
    similarity_encoder: str | None = None
    max_broken_share: float = 0.05
    claim_timeout: float = 120.0
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
            ("--claim-timeout", self.claim_timeout, self.claim_timeout >= 1, "at least 1 second"),
        ):
            if not fits:
                raise UserError(f"{name} {value} must be {must}")
        if not 0 <= self.bounds.least_words <= self.bounds.most_words:
            raise UserError(
                f"--words {self.bounds.least_words} {self.bounds.most_words} must be the least and the most"
            )

    def captioning(self) -> dict[str, Any]:
        """What `make_captioner` takes beside captioner and prompt."""
        return {name: getattr(self, name) for name in ("device", "batch_size", "max_new_tokens", "in_flight")}

    def settings(self) -> dict[str, Any]:
        """What the captions depend on beside the captioner and each shard's own data: recaption.json compares it."""
        return {
            "prompt": self.prompt.template,
            "fields": {"image": self.fields.image, "web": self.fields.web},
            "bounds": self.bounds.to_dict(),
            "on_bad": self.on_bad,
            "min_similarity_quantile": self.min_similarity_quantile,
            "similarity_encoder": self.similarity_encoder,
        }


def options_from_flags(flags: argparse.Namespace, prompt: Prompt, captioner: str, out: Path) -> Options:
    """UserError for flags that do not fit."""
    least, most = flags.words
    return Options(
        data=flags.data or demo_split(DEMO, "train"),
        out=out,
        captioner=captioner,
        prompt=prompt,
        fields=parse_fields(flags.fields, PAIRS),
        image_root=flags.image_root,
        shards=flags.shards,
        batch_size=flags.batch_size,
        max_new_tokens=flags.max_new_tokens,
        in_flight=flags.in_flight,
        bounds=Bounds(least, most, flags.script),
        on_bad=flags.on_bad,
        min_similarity_quantile=flags.min_similarity_quantile,
        similarity_encoder=flags.similarity_encoder,
        max_broken_share=flags.max_broken_share,
        claim_timeout=flags.claim_timeout,
        cache_gb=flags.cache_gb,
        device=flags.device,
    )
