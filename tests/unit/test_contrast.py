"""Texts of pages stand out from what is behind them, in both schemes: WCAG's 4.5 to 1."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

from mllm.chat.web_style import THEME

STYLE = (ROOT / "clips/common/templates/page.css").read_text(encoding="utf-8")
ROOTS = [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)]


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb (WCAG 2.2)."""
    digits = colour.removeprefix("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    dark, light = sorted(map(luminance, (a, b)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_wcag_s() -> None:
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#fff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("text", ["ink", "soft", "good", "bad"])
def test_texts_of_reports(scheme: str, text: str) -> None:
    light, dark = ROOTS
    colours = light if scheme == "light" else light | dark
    for behind in ("paper", "page"):
        assert contrast(colours[text], colours[behind]) >= 4.5, behind


@pytest.mark.parametrize("dark", ["", "_dark"])
@pytest.mark.parametrize(
    ("text", "behind"),
    [
        ("body_text_color_subdued", "body_background_fill"),
        ("body_text_color_subdued", "block_background_fill"),
        ("block_label_text_color", "block_background_fill"),
        ("input_placeholder_color", "input_background_fill"),
    ],
)
def test_grey_texts_of_the_chat_page(text: str, behind: str, dark: str) -> None:
    def colour(name: str) -> str:
        value = getattr(THEME, name + dark, None) or getattr(THEME, name)
        return colour(value[1:]) if value.startswith("*") else "#fff" if value == "white" else value

    assert contrast(colour(text), colour(behind)) >= 4.5
