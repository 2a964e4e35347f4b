"""Convolutional and hybrid towers of timm as transformers' `TimmWrapperModel`, which a stock FastVLM model holds.

Their tokens are the cells of the last feature map, row by row. A stock FastVLM model reads no other one.

Shapes: B images · S side of an image in pixels · C channels · g side of the map, S / stride.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TimmWrapperConfig, TimmWrapperModel

from clips.common.errors import UserError
from clips.common.files import read_json
from clips.common.hub import resolve
from clips.common.opening import check_size, load_weights, loading
from clips.common.tensors import read_weights
from mllm.encoders.encoder import check_close


def create(argument: str) -> tuple[Any, dict[str, Any]]:
    """Return timm's model (fp32, eval mode) for "NAME", "NAME:FILE" or "local-dir:DIR", and its arguments.

    With "@SIZE" at the end, the model sees images of SIZE × SIZE pixels. Raises UserError if it cannot be loaded.
    """
    name, at, size = argument.rpartition("@")
    name, side = (name, int(size)) if at and size.isdigit() else (argument, 0)
    overlay: dict[str, Any] = {"input_size": (3, side, side)} if side else {}
    arguments: dict[str, Any] = {}
    options: dict[str, Any] = {}
    source, _, place = name.partition(":")
    architecture = source
    if source in ("local-dir", "hf-hub"):
        directory = resolve(place, "vision encoder")
        config = read_json(directory / "config.json")
        architecture, arguments = str(config.get("architecture")), config.get("model_args") or {}
        name = f"local-dir:{directory}"
        if side and "img_size" in arguments:  # timm prefers it to the overlay
            options = {"img_size": side}
    elif place:
        name, overlay["state_dict"] = source, read_weights(Path(place))
    if not timm.is_model(architecture):
        close = ", ".join(difflib.get_close_matches(architecture, timm.list_models()))
        raise UserError(f"timm {timm.__version__} has no model {architecture!r}{close and f'; it has {close}'}")
    with loading("vision encoder", f"timm:{argument}"):
        if source in ("local-dir", "hf-hub"):
            check_size("vision encoder", directory, lambda: timm.create_model(name, pretrained=False))
        try:
            model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            problem = "names or shapes of tensors differ"
            raise UserError(f"timm:{argument}: its weights are not those of a {architecture}: {problem}") from None
    return model.float().eval(), arguments | options


@torch.no_grad()
def wrap(name: str, original: Any, arguments: Mapping[str, Any]) -> TimmWrapperModel:
    """Return the stock model that equals timm's `original`, which was built with `arguments`.

    Raises UserError if its features are no square map, or if the stride does not divide the image size.
    """
    source = original.pretrained_cfg
    side = timm.data.resolve_model_data_config(original)["input_size"][-1]
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    expected = original.forward_features(pixels)
    if expected.ndim != 4 or expected.shape[2] != expected.shape[3]:
        raise UserError(
            f"vision encoder {name} cannot be saved in a stock model: it is no plain ViT, and it gives no feature map "
            f"of channels × rows × columns, but {' × '.join(map(str, expected.shape[1:]))}"
        )
    stride = original.feature_info[-1]["reduction"]
    if side % stride:
        nearest = max(round(side / stride), 1) * stride
        raise UserError(
            f"vision encoder {name} sees {side} px, which its stride of {stride} does not divide: "
            f"give it another size, such as {name.removesuffix(f'@{side}')}@{nearest}"
        )
    built = {key: value for key, value in arguments.items() if key != "num_classes"}
    built |= {"img_size": side} if source.get("fixed_input_size") else {}
    # Fields that are not timm's: FastVLM reads the width, and the number of tokens follows from the sizes.
    others: dict[str, Any] = {"hidden_size": expected.shape[1], "image_size": side, "patch_size": stride}
    others["num_labels"] = 0
    config = TimmWrapperConfig(architecture=source["architecture"], model_args=built, do_pooling=False, **others)
    original.reset_classifier(0)
    state = {f"timm_model.{key}": tensor for key, tensor in original.state_dict().items()}
    with loading("vision encoder", name):
        model, _ = load_weights(TimmWrapperModel, "vision encoder", name, config=config, state_dict=state)
    check_close(model.eval(), model(pixels).last_hidden_state, expected)
    return model


def map_flops(tower: TimmWrapperModel, image_size: int) -> int:
    """Return the FLOPs of one image [3, S, S] through the tower, and back if it trains, counted on the meta device."""
    trains = any(parameter.requires_grad for parameter in tower.parameters())
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        copy = TimmWrapperModel(tower.config).eval().requires_grad_(trains)
        features = copy(torch.empty(1, 3, image_size, image_size)).last_hidden_state
        if trains:
            features.sum().backward()
    return counter.get_total_flops()
