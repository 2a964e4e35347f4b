"""clips/common/flags.py: the one way in which every command reads its flags."""

from dataclasses import dataclass
from typing import Literal

import pytest

from clips.common.flags import Parser, add_options, from_flags, given, option


@dataclass(frozen=True)
class Sizes:
    batch_size: int = option(8, "samples of a step")
    limit: int | None = option(None, "only so many", "--at-most")
    kind: Literal["a", "b"] = option("a", "which kind")
    words: tuple[str, ...] = option(("x", "y"), "which words")
    cache: bool = option(True, "compute everything again")
    lora_enable: bool = option(False, "as LLaVA spells it", underscores=True)
    own: str = "not a flag"


def parser() -> Parser:
    p = Parser("A command.")
    p.add_argument("--model", help="which model (default: the newest)")
    add_options(p, Sizes)
    return p


def test_the_fields_of_a_dataclass_are_flags() -> None:
    def read(*words: str) -> Sizes:
        return from_flags(Sizes, parser().parse_args(words))

    assert read() == Sizes()
    assert read("--batch-size", "2", "--at-most=3", "--kind", "b") == Sizes(2, 3, "b")
    assert read("--words", "p", "--words", "q", "r").words == ("p", "q", "r")
    assert read("--batch_size=2", "--no_cache", "--lora-enable") == Sizes(2, cache=False, lora_enable=True)
    assert read("--lora_enable", "False").lora_enable is False
    assert given(parser(), ["--batch-size", "8", "--at-most", "3"]) == {"batch_size", "limit"}


@pytest.mark.parametrize(
    ("word", "hint"), {"--batches": "--batch-size", "--pretrained": "--model", "--zzz": ""}.items()
)
def test_a_flag_that_is_not_known_ends_with_2(word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parser().parse_args([word, "3"])
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert word in text
    assert hint in text
