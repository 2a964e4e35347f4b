"""The choice of the demo's names: alike drawings have a margin above 0, exchanged drawings one below 0."""

from __future__ import annotations

from conftest import load_script
from PIL import Image, ImageDraw

agreement = load_script("tools/choose_names.py").agreement

COLOURS = {"first": "red", "second": "darkred"}


def drawn(shape: str, colour: str) -> Image.Image:
    image = Image.new("RGBA", (160, 160))
    pen = ImageDraw.Draw(image)
    if shape == "disc":
        pen.ellipse((20, 20, 140, 140), fill=colour)
    elif shape == "bar":
        pen.rectangle((60, 5, 100, 155), fill=colour)
    else:
        pen.polygon([(10, 150), (10, 10), (150, 150)], fill=colour)
    return image


def test_alike_drawings_have_a_margin_above_0_and_one_artist_s_has_none() -> None:
    sets = {artist: {shape: drawn(shape, c) for shape in ("disc", "bar", "wedge")} for artist, c in COLOURS.items()}
    assert all(min(found) > 0.1 and len(found) == 2 for found in agreement(sets).values())
    sets["second"]["wedge"] = sets["second"]["wedge"].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert min(agreement(sets)["wedge"]) > 0.1, "a mirrored drawing is the same drawing"
    sets["second"]["disc"], sets["second"]["bar"] = sets["second"]["bar"], sets["second"]["disc"]
    margins = agreement(sets)
    assert max(margins["disc"] + margins["bar"]) < 0 < min(margins["wedge"])
    assert agreement({"first": {"disc": drawn("disc", "red")}, "second": {}}) == {"disc": []}
