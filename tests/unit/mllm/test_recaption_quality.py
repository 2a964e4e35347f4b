"""Bad captions are found by their text; good captions stay unchanged."""

from __future__ import annotations

import pytest

from clips.data.demo import split_scene
from mllm.recaption.captioner import Written
from mllm.recaption.options import Bounds
from mllm.recaption.quality import Judged, judge, whole_sentences

PROMPT = "Describe the picture in detail: everything that can be seen in it, how many there are, and where each one is."
GOOD = (
    "A brown dog lies on a red sofa beside two cushions. Behind it, a window shows a garden with a wooden fence. "
    "The light is warm, and a cup stands on the floor."
)


def reason(text: str, *, web: str = "my dog", finished: bool = True, bounds: Bounds | None = None) -> str:
    return judge(Written(text, finished, 10), web, PROMPT, bounds or Bounds()).reason


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "The very, very long road leads to a small house. A small house stands by the road, too.",
        "There is a cat on the left. There is a cat on the right. There is a dog in the middle of the picture.",
        'A sign says "I\'m sorry, we are closed". Below it hangs a wreath.',
        "The words STOP STOP STOP STOP are painted on the road in white letters, one below the other.",
        "Photo from 1924. Unfortunately the left half is faded; a man and a horse can be seen on the right.",
        "An image of a user interface: the button reads <OK>, and 3 < 4 stands beside it.",
    ],
)
def test_captions_are_left_alone(text: str) -> None:
    assert judge(Written(text, True, 10), "my dog", PROMPT, Bounds()) == Judged(text, "", False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("I'm sorry, but I can't help with that picture today.", "refusal"),
        ("I’m unable to view images directly, but I can help.", "refusal"),
        ("Sorry, I cannot identify the people in this picture.", "refusal"),
        ("As an AI language model, I do not see pictures.", "refusal"),
        ("I don't see any image attached to your message here.", "refusal"),
        ("Please provide the image that I am to describe.", "refusal"),
        ("Sure! Everything that can be seen in it, how many there are: a dog and a cat.", "prompt echo"),
        ("<|im_start|>assistant A dog lies on a sofa.", "prompt echo"),
        ("My dog.", "prompt echo"),
        ("A dog on a sofa, " * 20, "repetition"),
        ("The picture is bright. " + "It is a nice picture of a dog. " * 6, "repetition"),
        ("dog " * 100_000, "repetition"),
        ("A dog.", "short"),
        (" ".join(f"word{i}" for i in range(500)), "long"),
        ("Рыжая собака лежит на красном диване возле окна.", "script"),
        ("一只棕色的狗躺在红色的沙发上，窗外有花园。", "script"),
        ("!!! ??? — … " * 3, "short"),
    ],
)
def test_what_is_no_caption_is_named(text: str, expected: str) -> None:
    assert reason(text) == expected


def test_another_script_may_be_asked_for() -> None:
    chinese = "一只棕色的狗躺在红色的沙发上，窗外有花园。"
    assert reason(chinese, bounds=Bounds(script="Han")) == ""
    assert reason(chinese, bounds=Bounds(script="any")) == ""
    assert reason(GOOD, bounds=Bounds(script="Han")) == "script"


def test_a_cut_off_caption_keeps_its_whole_sentences() -> None:
    cut = judge(Written(GOOD[:-12], False, 10), "my dog", PROMPT, Bounds())
    assert cut == Judged(GOOD[: GOOD.index(" The light")], "", True)
    whole = judge(Written(GOOD, False, 10), "my dog", PROMPT, Bounds())  # the limit came right after a sentence
    assert whole == Judged(GOOD, "", False)
    assert judge(Written("A brown dog lies on a", False, 10), "", PROMPT, Bounds()) == Judged("", "cut off", True)
    assert whole_sentences("One. One") == "One."
    assert whole_sentences("") == ""


def test_the_demo_s_own_captions_are_good() -> None:
    """Their sentences are of few forms, so that a check for repetition would find it first in them."""
    texts = [split_scene("test", number, 0)[1] for number in range(200)]
    judged = [reason(" ".join(text.sentences), web=text.web) for text in texts]
    assert judged == [""] * 200
