"""What plan_run.py says of LLaVA's stages: sizes as published, what fits, what is refused."""

import pytest

from clips.common.errors import UserError
from clips.engine.metrics import Machine
from mllm.training.build import count_parameters
from mllm.training.rehearsal import LANGUAGE_MODELS, Planned, print_stages

PUBLISHED = {
    "smollm2-135m": 134.5e6,
    "vicuna-7b": 6.738e9,
    "vicuna-13b": 13.016e9,
    "llama3-8b": 8.030e9,
    "qwen2.5-7b": 7.616e9,
}
"""Parameters of the language models."""
VISION = {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 768}
VISION |= {"image_size": 224, "patch_size": 14}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_have_their_published_size(name: str) -> None:
    counts = count_parameters(Planned(name, VISION).build())
    assert counts["word_embeddings"][0] + counts["language_model"][0] == pytest.approx(PUBLISHED[name], rel=1e-3)


def test_tiles_and_videos_have_their_crops_and_tokens() -> None:
    layouts = [Planned("smollm2-135m", VISION, tiles, frames).layout for tiles, frames in ((None, 0), ("2x2", 32))]
    assert [layout.most for layout in layouts] == [256, 32 * 8**2 + 1]
    assert [layout.most_crops for layout in layouts] == [1, 32]
    for wrong in ((None, 8), ("4x4", 8), ("7x1", 0)):
        with pytest.raises(UserError, match=r"--frames|--tiles"):
            Planned("smollm2-135m", VISION, *wrong)
    with pytest.raises(UserError, match="gpt-5"):
        Planned("gpt-5", VISION)


def test_an_image_with_most_tokens_and_a_video_with_most_crops(capsys: pytest.CaptureFixture[str]) -> None:
    print_stages(Planned("smollm2-135m", VISION, "3x3", 20), Machine("h100", 1, 0.2), lora=False)
    assert "instruct" in capsys.readouterr().out


def test_both_stages_with_what_comes_before_their_first_step(monkeypatch, capsys):
    """6 N operations a token for forward and backward, 2 N for checkpointing; attention and encoder come on top."""
    monkeypatch.setitem(LANGUAGE_MODELS, "vicuna-7b", LANGUAGE_MODELS["vicuna-7b"] | {"num_hidden_layers": 2})
    print_stages(Planned("vicuna-7b", VISION), Machine("h100", 8, 0.2), lora=False)
    printed = capsys.readouterr().out
    (row,) = (line.split("│")[1:] for line in printed.splitlines() if "instruct" in line)
    layers = 2 * (4 * 4096**2 + 3 * 4096 * 11_008)
    assert 1 < float(row[6]) * 1e12 / (8 * layers * (256 + 250)) < 1.2
    assert int(row[7].replace(",", "")) == 5198  # LLaVA-1.5's own
    assert "feature cache's encoder" in printed
    assert "28 GB of the machine's memory" in printed
    # in bf16 two layers, both word tables and the projector; an eighth of them and one table
    assert "a rank holds its part and one weight, at most 0.434 GB; the model is gathered into 1.37 GB" in printed
    print_stages(Planned("vicuna-7b", VISION), Machine("h100", 1, 0.2), lora=True)
    (adapted,) = (line.split("│")[1:] for line in capsys.readouterr().out.splitlines() if "instruct" in line)
    assert float(adapted[6]) < 0.85 * float(row[6])
