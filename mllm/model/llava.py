"""Build a stock LLaVA model and its processor from a vision encoder, a projector and a language model.

The class is `LlavaForConditionalGeneration`, or `LlavaNextForConditionalGeneration` with tiles (mllm/model/tiles.py),
or `LlavaOnevisionForConditionalGeneration` with videos, or `FastVlmForConditionalGeneration` if the encoder's tokens
are the cells of a feature map (mllm/encoders/maps.py).
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from torch import nn
from transformers import (
    AutoModel,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedModel,
)

from clips.common.errors import UserError
from clips.common.files import replacing, write_json
from clips.common.model_card import write_card
from mllm.data.formats import IMAGE_TOKEN, VIDEO_TOKEN, token_id
from mllm.encoders.encoder import VisionEncoder, gives_map
from mllm.model.llm import LanguageModel
from mllm.model.load import FACTS, model_name
from mllm.model.projector import ProjectorKind, init_projector, projector_activation, save_projector
from mllm.model.tiles import Llava, LlavaProcessors, TokenLayout, newline_of

CODE = """\
from transformers import pipeline

source = "."
chat = pipeline("image-text-to-text", model=source)
content = [{"type": "image", "url": "image.png"}, {"type": "text", "text": "What is in the image?"}]
answer = chat(text=[{"role": "user", "content": content}], max_new_tokens=64, return_full_text=False)
print(answer[0]["generated_text"])"""
VIDEOS = """\
A video is `{"type": "video", "path": "clip.mp4"}` in `content`, which torchcodec decodes, or
`{"type": "video", "video": frames}`, an array uint8 of frames × height × width × 3. The model sees FRAMES of them."""


def build_model(
    vision: VisionEncoder, llm: LanguageModel, *, projector: ProjectorKind = "mlp2x_gelu", seed: int = 0
) -> tuple[Llava, LlavaProcessors]:
    """Assemble a stock LLaVA model and its processor; encoder and language model are shared, not copied.

    The new projector, and with tiles the newline embedding, are drawn with `seed`. Raises UserError if one image fills
    the context, or for tiles or a language model that transformers' class cannot hold.
    """
    causal = llm.model
    context = llm.context_length
    if context is not None and vision.num_tokens >= context:
        raise UserError(f"one image takes {vision.num_tokens} tokens ({vision.name}), the context is {context}")
    kind: dict[str, Any] = {"image_seq_length": vision.num_tokens}
    tiles, videos, maps = bool(vision.pinpoints), bool(vision.frames), gives_map(vision.config)
    config_class, model_class = stock_classes(tiles=tiles, videos=videos, maps=maps)
    if vision.pinpoints:
        kind |= {"tie_word_embeddings": causal.config.tie_word_embeddings, "image_grid_pinpoints": vision.pinpoints}
    if vision.frames:
        kind |= {"num_frames": vision.frames, "video_token_index": token_id(llm.tokenizer, VIDEO_TOKEN)}
        del kind["image_seq_length"]
    config = config_class(
        **kind,
        vision_config=copy.deepcopy(vision.config),
        text_config=copy.deepcopy(causal.config),
        image_token_index=llm.image_token_id,
        vision_feature_layer=vision.select_layer,
        vision_feature_select_strategy=vision.select_feature,
        projector_hidden_act=projector_activation(projector),
        pad_token_id=llm.tokenizer.pad_token_id,
    )
    TokenLayout.of(config)  # raises UserError for tiles that the stock class would process differently
    parts: list[Any] = [config.vision_config, config.text_config]
    for part in parts:
        part._name_or_path = ""  # may be a path of this machine
        part.__dict__.pop("auto_map", None)  # points to code that is not saved with the model, and not needed
    _check_language_model(llm, config)
    with torch.device("meta"):
        model: Any = model_class(config)
    model.model.vision_tower = vision.model
    model.model.language_model = causal.base_model
    model.lm_head = causal.get_output_embeddings()
    model.model.multi_modal_projector.to_empty(device=causal.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        init_projector(model.model.multi_modal_projector)
        if vision.pinpoints:  # initialised as in LLaVA-NeXT
            newline = torch.randn(causal.config.hidden_size) / causal.config.hidden_size**0.5
            model.model.image_newline = nn.Parameter(newline.to(causal.device, causal.dtype))
    model.model.multi_modal_projector.to(causal.dtype)
    model.generation_config = copy.deepcopy(causal.generation_config)
    try:
        model.generation_config.validate(strict=True)  # saving would fail on it only after hours of training
    except ValueError as error:
        raise UserError(f"language model {llm.source}: its generation_config.json cannot be saved: {error}") from None
    model.eval()
    _check_logits(model, causal, llm.source)
    return model, build_processor(vision, llm)


def stock_classes(*, tiles: bool, videos: bool, maps: bool = False) -> tuple[Any, Any]:
    """Return transformers' classes of the configuration and of the model."""
    if videos:
        return LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
    if tiles:
        return LlavaNextConfig, LlavaNextForConditionalGeneration
    if maps:
        return FastVlmConfig, FastVlmForConditionalGeneration
    return LlavaConfig, LlavaForConditionalGeneration


def build_processor(vision: VisionEncoder, llm: LanguageModel) -> LlavaProcessors:
    """Return the stock processor, with the preprocessing of `vision` and as many `<image>` tokens as it produces."""
    if vision.frames:
        settings = vision.image_processor.to_dict()
        names = ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")
        look = {name: settings[name] for name in names}
        return LlavaOnevisionProcessor(
            image_processor=vision.image_processor,
            tokenizer=llm.tokenizer,
            video_processor=LlavaOnevisionVideoProcessor(**look, num_frames=vision.frames, do_sample_frames=True),
            num_image_tokens=vision.num_tokens + (vision.select_feature == "default"),  # it counts the CLS token
            vision_feature_select_strategy=vision.select_feature,
            chat_template=llm.tokenizer.chat_template,
            image_token=IMAGE_TOKEN,
            video_token=VIDEO_TOKEN,
        )
    return (LlavaNextProcessor if vision.pinpoints else LlavaProcessor)(
        image_processor=vision.image_processor,
        tokenizer=llm.tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=vision.select_feature,
        num_additional_image_tokens=vision.prefix_tokens,
        chat_template=llm.tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
    )


def _check_language_model(llm: LanguageModel, config: Any) -> None:
    with torch.device("meta"):
        stock = type(AutoModel.from_config(config.text_config))
    head = llm.model.get_output_embeddings()
    if stock is not type(llm.model.base_model) or not isinstance(head, nn.Linear) or head.bias is not None:
        raise UserError(f"language model {llm.source}: LLaVA holds a {stock.__name__} and an output layer without bias")


@torch.no_grad()
def _check_logits(model: Llava, causal: PreTrainedModel, source: str) -> None:
    """Raise UserError if the stock class computes other logits than the language model, which may scale or cap them."""
    ids = torch.arange(1, 9, device=causal.device)[None] % causal.config.vocab_size
    causal.eval()
    stock, original = model(input_ids=ids).logits, causal(input_ids=ids).logits
    if not torch.allclose(stock.float(), original.float(), rtol=1e-3, atol=1e-3):
        difference = f"{(stock - original).abs().max():.1e}"
        raise UserError(f"language model {source}: a stock LLaVA model computes other logits, by up to {difference}")


def save_model(
    model: Llava,
    processor: LlavaProcessors,
    directory: Path,
    *,
    card: Mapping[str, str],
    base_model: str | None = None,
    beside: Mapping[str, bytes] | None = None,
    trained_on: Mapping[str, str] | None = None,
) -> None:
    """Write a stock model directory: weights, configs, processor, chat template, LLaVA's mm_projector.bin, README.md.

    The directory is replaced atomically. Under ZeRO-3 call this function inside `full_on_rank_0`.

    `card` holds the rows of the model card in order, a text for each title ("Vision encoder", "Stage 1 data", …), and
    `base_model` is the hub id of the language model, if it has one. The file FACTS holds `trained_on`, the data of each
    stage ("demo" or a file name). `beside` holds the contents of more small files by relative path.
    """
    directory = Path(directory)
    with replacing(directory) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        # In a file of its own too, because vLLM and lmms-eval look for the image processor there.
        processor.image_processor.save_pretrained(partial)
        # A .bin file, because servers load every *.safetensors of a directory, and this one repeats weights.
        save_projector(model.model.multi_modal_projector, partial / "mm_projector.bin", newline_of(model))
        write_json(partial / FACTS, {"trained_on": trained_on})
        for name, content in (beside or {}).items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)
        config: Any = model.config
        layout = TokenLayout.of(config)
        tokens = f"up to {layout.most}" if layout.pinpoints else layout.tokens_per_crop
        name = model_name(str(directory))
        vision = config.vision_config
        loaders = "transformers loads it" if gives_map(vision) else "transformers and vLLM load it"
        write_card(
            partial,
            ModelCardData(
                library_name="transformers", pipeline_tag="image-text-to-text", base_model=base_model,
                tags=["llava", "clips-mllm"], model_name=name,
            ),
            name=name,
            about=f"A LLaVA-style model: {getattr(vision, 'architecture', vision.model_type)} vision encoder, "
            f"{config.text_config.model_type} language model, {tokens} tokens per image. It was made with CLIPS-MLLM, "
            f"and {loaders}.",
            facts=card,
            code=CODE,
            note=VIDEOS.replace("FRAMES", str(layout.frames)) if layout.frames else "",
        )  # fmt: skip
