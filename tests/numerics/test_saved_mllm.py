"""Saved models in a process that has only the stock libraries: same logits, and the pipeline answers."""

import html
import json
import subprocess
import sys

import pytest
import torch
from hostile import HOSTILE
from markdown_it import MarkdownIt
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_mllm import MAPS, make_images, write_llm, write_map, write_run, write_siglip
from transformers import GraniteConfig, GraniteForCausalLM, LlavaForConditionalGeneration

from clips.common.errors import UserError
from mllm.encoders.load import load_vision
from mllm.model.llava import build_model, save_model
from mllm.model.llm import load_llm
from mllm.model.projector import load_projector
from mllm.model.tiles import TokenLayout
from mllm.training.build import merge_lora

# Runs with `python -I` in another directory; the project, installed or not, cannot be imported.
STOCK = """
import sys
sys.modules["clips"] = sys.modules["mllm"] = None
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

for name in sys.argv[1:]:
    model, info = AutoModelForImageTextToText.from_pretrained(f"{name}/model", output_loading_info=True)
    assert not any(info.values()), info
    kind = "FastVlm" if "map" in name else "LlavaNext" if "tiles" in name else "Llava"
    assert type(model).__name__ == f"{kind}ForConditionalGeneration"
    processor = AutoProcessor.from_pretrained(f"{name}/model")
    image = Image.open("images/0.png").convert("RGB")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
        generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    messages[0]["content"][0] = {"type": "image", "image": image}
    chat = pipeline("image-text-to-text", model=f"{name}/model")
    answer = chat(text=messages, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    own = processor.tokenizer.decode(generated[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    batch = processor(images=[[image], [image]], text=[prompt, "Longer words before. " + prompt], padding=True,
                      return_tensors="pt")
    torch.save({"inputs": dict(inputs), "logits": logits,
                "answer": answer, "own": own, "batch_mask": batch["attention_mask"],
                "modules": [name for name in sys.modules if name.startswith(("clips.", "mllm."))]}, f"{name}/out.pt")
"""


VARIANTS = {  # encoder, options of load_vision, projector, tied embeddings
    "clips": ("clips", {}, "mlp2x_gelu", True),
    "clips_linear_padded": ("clips", {"image_aspect_ratio": "pad", "select_layer": -1}, "linear", False),
    "pre_norm_all_tokens": ("pre_norm", {"select_feature": "full"}, "mlp2x_gelu", False),
    "clips_without_cls": ("without_cls", {}, "mlp2x_gelu", False),
    "siglip_two_layers": ("siglip", {"select_layer": [-2, -1]}, "linear", True),
    "blind": ("blind", {}, "mlp2x_gelu", True),
    "clips_tiles": ("clips", {"image_aspect_ratio": "anyres"}, "mlp2x_gelu", True),
    **{f"map_{kind}": (kind, {"select_layer": -1}, "mlp2x_gelu", True) for kind in MAPS},
    "map_padded": ("ResNet", {"select_layer": -1, "image_aspect_ratio": "pad"}, "linear", False),
}


def build(place, variant):
    """(encoder, language model, LLaVA model, projector's kind) of a variant, saved as `place`/VARIANT/model."""
    kind, options, projector, tie = VARIANTS[variant]
    tower = place / variant / "tower"
    if kind == "siglip":
        name = write_siglip(tower)
    elif kind in MAPS:
        name = write_map(tower, kind)
    else:
        write_run(tower, pre_norm=kind == "pre_norm", cls=kind != "without_cls")
        name = f"{'blind' if kind == 'blind' else 'clips'}:{tower}"
    vision = load_vision(name, **options)
    llm = load_llm(str(write_llm(place / variant / "llm", tie=tie)))
    model, processor = build_model(vision, llm, projector=projector, seed=3)
    card = {"Vision encoder": vision.describe(), "Language model": llm.source, "Stage 1": HOSTILE["markdown"]}
    save_model(model, processor, place / variant / "model", card=card)
    return vision, llm, model, projector


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of all variants, and what was saved; one process has opened each with the stock libraries."""
    place = tmp_path_factory.mktemp("saved")
    built = {variant: build(place, variant) for variant in VARIANTS}
    make_images(place / "images", 1)
    command = [sys.executable, "-I", "-c", STOCK, *VARIANTS]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return place, built


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_model_is_stock(saved, variant):
    place, built = saved
    vision, llm, model, projector = built[variant]
    stock = torch.load(place / variant / "out.pt", weights_only=True)
    assert stock["modules"] == []
    assert stock["answer"] == stock["own"]
    image = Image.open(place / "images" / "0.png").convert("RGB")
    inputs, layout = stock["inputs"], TokenLayout.of(model.config)
    tokens = layout.tokens((image.height, image.width))
    assert inputs["input_ids"][0].tolist().count(llm.image_token_id) == tokens
    assert (tokens == vision.num_tokens) != bool(layout.pinpoints)
    assert stock["batch_mask"][0, 0] == 0  # padded on the left
    assert stock["batch_mask"][:, -1].all()
    assert torch.equal(
        inputs["pixel_values"], vision.image_processor(images=image, return_tensors="pt")["pixel_values"]
    )
    with torch.no_grad():
        expected = model(**inputs).logits
    assert torch.equal(stock["logits"], expected)
    assert expected.std() > 0.1

    directory = place / variant / "model"
    assert [path.name for path in directory.glob("*.safetensors")] == ["model.safetensors"]
    for path in [*directory.glob("*.json"), directory / "chat_template.jinja"]:
        assert str(place) not in path.read_text(), path
    shown = MarkdownIt("commonmark").enable("table").render((directory / "README.md").read_text("utf-8"))
    assert f"<td>{html.escape(HOSTILE['markdown'], quote=False)}</td>" in shown
    assert json.loads((directory / "preprocessor_config.json").read_text())["crop_size"]["height"] == vision.image_size
    again, _ = build_model(vision, llm, projector=projector, seed=4)
    load_projector(again.model.multi_modal_projector, directory)
    features = torch.randn(1, 3, vision.width)
    assert torch.equal(again.model.multi_modal_projector(features), model.model.multi_modal_projector(features))


@pytest.fixture
def built(tmp_path):
    write_run(tmp_path / "tower")
    vision = load_vision(f"clips:{tmp_path / 'tower'}")
    return build_model(vision, load_llm(str(write_llm(tmp_path / "llm"))))


def test_seed_decides_the_projector_only(tmp_path, built):
    vision = load_vision(f"clips:{tmp_path / 'tower'}")
    torch.manual_seed(99)
    same, _ = build_model(vision, load_llm(str(tmp_path / "llm")))
    other, _ = build_model(vision, load_llm(str(tmp_path / "llm")), seed=1)
    for name, tensor in built[0].state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name]), name
        differs = not torch.equal(tensor, other.state_dict()[name])
        assert differs == ("multi_modal_projector" in name), name


def test_merged_lora_gives_the_logits_of_the_adapters(built):
    model, _ = built
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj|down_proj)"))
    torch.manual_seed(0)
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        adapted = lora.eval()(input_ids=ids).logits
        with lora.disable_adapter():
            assert not torch.allclose(lora(input_ids=ids).logits, adapted, atol=0.1)
        merged = merge_lora(lora)
        assert type(merged) is LlavaForConditionalGeneration
        assert not any("lora" in name for name in merged.state_dict())
        assert torch.allclose(merged(input_ids=ids).logits, adapted, atol=1e-4 * adapted.abs().max())
    assert merge_lora(merged) is merged


def test_what_stock_llava_cannot_hold_is_refused(tmp_path):
    write_run(tmp_path / "tower")
    vision = load_vision(f"clips:{tmp_path / 'tower'}")
    llm = load_llm(str(write_llm(tmp_path / "llm", max_position_embeddings=16)))
    with pytest.raises(UserError, match=r"one image takes 16 tokens .* is 16"):
        build_model(vision, llm)
    llm = load_llm(str(write_llm(tmp_path / "llm2", tie=False)))
    llm.model.lm_head = torch.nn.Linear(48, llm.model.lm_head.out_features)
    with pytest.raises(UserError, match="output layer without bias"):
        build_model(vision, llm)
    # Granite divides its logits, which stock LLaVA does not: the model would silently be another one.
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = GraniteConfig(vocab_size=400, **sizes, num_key_value_heads=2, logits_scaling=8.0, initializer_range=0.3)
    GraniteForCausalLM(config).save_pretrained(tmp_path / "granite")
    for path in (tmp_path / "llm").glob("*token*"):
        (tmp_path / "granite" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="other logits"):
        build_model(vision, load_llm(str(tmp_path / "granite")))
