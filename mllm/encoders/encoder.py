"""A vision encoder as the language side uses it: features, number of tokens, preprocessing, fingerprint."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    LlavaImageProcessor,
    LlavaNextImageProcessor,
    LlavaOnevisionImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
    ViTModel,
)

from clips.common.errors import UserError
from clips.common.opening import loading
from clips.common.tensors import hash_weights

SelectFeature = Literal["default", "full"]
AspectRatio = Literal["square", "pad", "anyres"]
ImageProcessor = CLIPImageProcessor | LlavaImageProcessor | LlavaNextImageProcessor | LlavaOnevisionImageProcessor
"""LLaVA adds padding to a square to CLIP's, LLaVA-NeXT adds tiles, and LLaVA-OneVision adds tiles and videos."""
UNUSED = ("pooler.", "head.", "vision_model.head.")
"""Prefixes of parameters that come after the token features and so do not count as the encoder's."""


KINDS: dict[str, type[PreTrainedModel]] = {
    "clip_vision_model": CLIPVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "vit": ViTModel,
    "dinov2": Dinov2Model,
    "dinov2_with_registers": Dinov2WithRegistersModel,
}
"""The model class that a stock LLaVA model holds, for each `model_type` of transformers."""


def gives_map(config: Any) -> bool:
    """Return True for a tower whose tokens are the cells of a feature map (mllm/encoders/maps.py)."""
    return config.model_type == "timm_wrapper"


def prefix_tokens(config: Any) -> int:
    """Return the number of tokens before the patches: CLS and registers. SigLIP and feature maps have none."""
    has_none = gives_map(config) or config.model_type == "siglip_vision_model"
    return 0 if has_none else 1 + getattr(config, "num_register_tokens", 0)


def keep_statistics(tower: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put batch norms into eval mode: an encoder that trains keeps the statistics of its pretraining.

    With `dtype` the statistics are cast to it, because DeepSpeed casts parameters but no buffers.
    """
    for module in tower.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            for buffer in (module.running_mean, module.running_var):
                if buffer is not None and dtype is not None:
                    buffer.data = buffer.data.to(dtype)


@dataclass(frozen=True, kw_only=True)
class VisionEncoder:
    """An encoder, its preprocessing, and which of its features are used."""

    name: str
    source: str
    """Where the weights came from, as a text for people."""
    model: PreTrainedModel
    image_processor: ImageProcessor
    select_layer: int | list[int] = -2
    """Index into the hidden states (0 = embeddings); several layers are concatenated along the width."""
    select_feature: SelectFeature = "default"
    """"default" drops the first token (CLS), "full" keeps all tokens."""
    frames: int = 0
    """Number of frames of a video, or 0 if the model takes no videos."""

    @property
    def config(self) -> PreTrainedConfig:
        """The vision config that is saved in a LLaVA model."""
        return self.model.config

    @property
    def prefix_tokens(self) -> int:
        """Number of tokens before the patches (CLS, registers)."""
        return prefix_tokens(self.config)

    @property
    def image_size(self) -> int:
        """Side, in pixels, of the squares that the image processor returns."""
        square: Any = self.image_processor.crop_size
        return square["height"]

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        size = self.config.patch_size
        return size if isinstance(size, int) else size[0]

    @property
    def pinpoints(self) -> list[list[int]]:
        """(height, width) in pixels of each grid for tiles. The list is empty if an image is one square."""
        return list(getattr(self.image_processor, "image_grid_pinpoints", None) or [])

    @property
    def num_tokens(self) -> int:
        """Number of tokens that one square takes in the language model, counted as in `LlavaProcessor`."""
        dropped = self.select_feature == "default"
        return (self.image_size // self.patch_size) ** 2 + self.prefix_tokens - dropped

    @property
    def width(self) -> int:
        """Width W of the tokens that the projector reads; several layers are concatenated."""
        layers = 1 if isinstance(self.select_layer, int) else len(self.select_layer)
        return self.config.hidden_size * layers

    def features(self, pixel_values: Tensor) -> Tensor:
        """Return the tokens [B, N, W] for the projector from `pixel_values` [B, 3, S, S]."""
        return select_features(self.model, pixel_values, self.select_layer, self.select_feature)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over weights, layer and preprocessing. Encoders with equal fingerprints give equal features."""
        digest = self._weights()
        config = {key: value for key, value in self.config.to_dict().items() if key not in VOLATILE}
        settings = [config, self.image_processor.to_dict(), self.select_layer, self.select_feature]
        settings += [self.frames] if self.frames else []
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    @property
    def weights_fingerprint(self) -> str:
        """SHA-256 over the weights alone, independent of preprocessing."""
        return self._weights().hexdigest()

    def _weights(self) -> Any:
        tensors = self.model.state_dict()
        return hash_weights({name: tensors[name] for name in tensors if not name.startswith(UNUSED)})

    def describe(self) -> str:
        """Return one line about the encoder for plans and model cards."""
        tiles = f", whole and up to {self.most_tiles} tiles" if self.pinpoints else ""
        tiles += f", videos in {self.frames} frames" if self.frames else ""
        is_padded = getattr(self.image_processor, "do_pad", False) and not self.pinpoints
        return (
            f"{self.name} ({type(self.model).__name__} from {self.source}; {self.image_size} px{tiles}"
            f"{', padded to a square' if is_padded else ''}, {self.num_tokens} tokens × {self.width}, "
            f"layer {self.select_layer}, {'patch tokens' if self.select_feature == 'default' else 'all tokens'})"
        )

    @property
    def most_tiles(self) -> int:
        """Number of tiles of the largest grid, or 0 if an image is one square."""
        return max((height * width // self.image_size**2 for height, width in self.pinpoints), default=0)

    @property
    def weights_name(self) -> str:
        """Name of the run that exported the weights, or of their file or directory, without a path of this machine."""
        place = Path(self.source)
        exported = place.parts[-2:] == ("export", "hf_vit")
        return place.resolve().parents[1].name if exported else Path(self.name.partition(":")[2]).name


TOLERANCE = 1e-3
"""Largest allowed difference of tokens between a mapped model and its original, relative to their largest value."""
VOLATILE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "auto_map")
"""Config entries that do not affect the features."""


def select_features(model: PreTrainedModel, pixel_values: Tensor, layer: int | list[int], strategy: str) -> Tensor:
    """Return the tokens [B, N, W] of `model` that a stock LLaVA or FastVLM model would select."""
    if gives_map(model.config):
        return model(pixel_values).last_hidden_state.flatten(2).permute(0, 2, 1)
    hidden_states = model(pixel_values, output_hidden_states=True).hidden_states
    chosen = [hidden_states[i] for i in ([layer] if isinstance(layer, int) else layer)]
    return torch.cat([states[:, 1:] if strategy == "default" else states for states in chosen], dim=-1)


def check_close(model: PreTrainedModel, mapped: Tensor, tokens: Tensor) -> None:
    """Raise UserError unless the tokens of the stock `model`, `mapped`, are those of its original."""
    fits = mapped.shape == tokens.shape
    difference = (mapped - tokens).abs().max() / tokens.abs().max() if fits else torch.inf
    if not difference <= TOLERANCE:
        raise UserError(f"not what transformers' {type(model).__name__} computes: tokens differ by {difference:.1e}")


@torch.no_grad()
def check_tokens(encoder: VisionEncoder) -> None:
    """Run one image through preprocessing and model. Raises UserError if stock LLaVA expects other tokens."""
    if gives_map(encoder.config):
        if encoder.select_layer != -1:
            fix = "a stock FastVLM model reads one map, the last: set --mm_vision_select_layer -1"
            raise UserError(f"mm_vision_select_layer {encoder.select_layer} of {encoder.name}: {fix}")
        if encoder.pinpoints:
            fix = "a stock FastVLM model has no tiles: set --image_aspect_ratio pad"
            raise UserError(f"image_aspect_ratio anyres with {encoder.name}: {fix}")
    layers: Any = getattr(encoder.config, "num_hidden_layers", 0)
    chosen = [encoder.select_layer] if isinstance(encoder.select_layer, int) else encoder.select_layer
    if not chosen or not all(-layers - 1 <= layer <= layers for layer in chosen):
        known = f"{-layers - 1} … {layers} (0 = embeddings)"
        raise UserError(f"mm_vision_select_layer {encoder.select_layer}: {encoder.name} has layers {known}")
    processor: Any = encoder.image_processor
    pixels = processor(images=np.zeros((48, 64, 3), dtype=np.uint8), return_tensors="pt")["pixel_values"]
    with loading("vision encoder", encoder.name):
        shape = tuple(encoder.features(pixels.flatten(0, -4)).shape)  # with tiles there is one more dimension
    expected = (encoder.num_tokens, encoder.width)
    if shape[1:] != expected:
        raise UserError(f"vision encoder {encoder.name} gives tokens {shape[1:]}, but stock LLaVA expects {expected}")
    cells = (encoder.image_size // encoder.patch_size) ** 2
    if encoder.pinpoints and (encoder.num_tokens != cells or encoder.image_size != encoder.config.image_size):
        mend = "set --mm_vision_select_feature patch or --image_aspect_ratio pad"
        raise UserError(f"vision encoder {encoder.name}: anyres needs a square of one token for each patch: {mend}")
