"""The projector between vision encoder and language model, in transformers' own class and LLaVA's file format.

`LlavaMultiModalProjector` computes linear_1 → activation → linear_2. Two kinds of projectors fit into it exactly:

    mlp2x_gelu   activation "gelu"; linear_1 and linear_2 are LLaVA's mm_projector.0 and mm_projector.2
    linear       activation "linear" (identity) and linear_2 fixed to the identity matrix with zero bias;
                 linear_1 is LLaVA's mm_projector

Shapes: W width of an image token · D width of a word embedding · n rows.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from clips.common.errors import UserError
from clips.common.tensors import read_weights

ProjectorKind = Literal["linear", "mlp2x_gelu"]
ACTIVATION: dict[str, str] = {"mlp2x_gelu": "gelu", "linear": "linear"}
"""`LlavaConfig.projector_hidden_act` for each kind of projector."""
LLAVA_NAMES = {
    "mlp2x_gelu": {"linear_1": "model.mm_projector.0", "linear_2": "model.mm_projector.2"},
    "linear": {"linear_1": "model.mm_projector"},
}
"""The names of each kind's layers in LLaVA's mm_projector files, by their names here."""
NEWLINE_IN_FILE = "model.image_newline"
PREFIXES = ("base_model.", "model.", "mm_projector.", "multi_modal_projector.")


def projector_activation(kind: str) -> str:
    """Return `LlavaConfig.projector_hidden_act` for a projector kind. Raises UserError for an unknown kind."""
    if kind not in ACTIVATION:
        raise UserError(f"mm_projector_type {kind!r} is not known; choose one of: {', '.join(ACTIVATION)}")
    return ACTIVATION[kind]


def projector_kind(projector: LlavaMultiModalProjector) -> ProjectorKind:
    """Return "mlp2x_gelu" or "linear", LLaVA's name for the projector's layers, judged by its activation."""
    return "mlp2x_gelu" if "GELU" in type(projector.act).__name__ else "linear"


def trainable_layers(projector: LlavaMultiModalProjector) -> dict[str, nn.Linear]:
    """Return the layers that training changes, which are all but the fixed identity of kind `linear`."""
    return {name: getattr(projector, name) for name in LLAVA_NAMES[projector_kind(projector)]}


@torch.no_grad()
def init_projector(projector: LlavaMultiModalProjector) -> None:
    """Initialise the weights with PyTorch's default, as LLaVA does, from torch's current random state.

    In a "linear" projector the second layer becomes the identity.
    """
    for layer in (projector.linear_1, projector.linear_2):
        layer.reset_parameters()
    if projector_kind(projector) == "linear":
        nn.init.eye_(projector.linear_2.weight)
        nn.init.zeros_(projector.linear_2.bias)


def llava_tensors(projector: LlavaMultiModalProjector) -> dict[str, Tensor]:
    """Return the projector's weights under LLaVA's names, copied to the CPU."""
    return {
        f"{LLAVA_NAMES[projector_kind(projector)][name]}.{part}": parameter.detach().to("cpu").clone()
        for name, layer in trainable_layers(projector).items()
        for part, parameter in layer.named_parameters()
    }


def save_projector(projector: LlavaMultiModalProjector, path: Path, newline: Tensor | None = None) -> None:
    """Write LLaVA's `mm_projector.bin`, a torch file of plain tensors.

    `newline` [D], the newline embedding of models with tiles, is saved with it under LLaVA-NeXT's name.
    """
    tensors = llava_tensors(projector)
    if newline is not None:
        tensors[NEWLINE_IN_FILE] = newline.detach().to("cpu").clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path)


@torch.no_grad()
def load_projector(projector: LlavaMultiModalProjector, path: Path, newline: Tensor | None = None) -> None:
    """Copy the weights of a projector file (.safetensors or .bin, LLaVA's or transformers' names) into `projector`.

    If `path` is a directory, its mm_projector.bin is read. `newline` [D] is overwritten if the file has one; a file
    from a stage 1 without tiles has none. Raises UserError if the file does not fit.
    """
    path = path / "mm_projector.bin" if path.is_dir() else path
    weights = read_weights(path)
    assign_projector(projector, weights, path)
    if newline is not None and NEWLINE_IN_FILE in weights:  # it has the width of the projector, which was checked
        newline.copy_(weights[NEWLINE_IN_FILE])


@torch.no_grad()
def assign_projector(projector: LlavaMultiModalProjector, weights: Mapping[str, Tensor], path: Path | str) -> None:
    """Copy a projector's weights (under LLaVA's or transformers' names) into `projector`; other tensors are ignored.

    Raises UserError naming `path`, from which they were read, if they are of another kind or shape.
    """
    marked = {n: t for n, t in weights.items() if "mm_projector" in n or "multi_modal_projector" in n}
    layers = {"0": "linear_1", "2": "linear_2", "weight": "linear_1.weight", "bias": "linear_1.bias"}
    tensors = {}
    for name, tensor in (marked or weights).items():
        first, *rest = _short(name).split(".")
        tensors[".".join([layers.get(first, first), *rest])] = tensor
    parts = [{f"linear_{i}.{part}" for part in ("weight", "bias")} for i in (1, 2)]
    if set(tensors) not in (parts[0], parts[0] | parts[1]):
        raise UserError(f"{path} holds no projector of a known kind. Its tensors: {', '.join(sorted(tensors))}")
    kind = projector_kind(projector)
    is_linear = "linear_2.weight" not in tensors
    if kind == "linear" and not is_linear:  # as transformers saves it, with the fixed identity
        second = tensors["linear_2.weight"].float()
        is_linear = torch.equal(second, torch.eye(len(second))) and not tensors["linear_2.bias"].any()
    found_kind = "linear" if is_linear else "mlp2x_gelu"
    if found_kind != kind:
        raise UserError(f"{path} holds a {found_kind} projector, this model has {kind}: set --mm_projector_type")
    current = projector.state_dict()
    for name, tensor in tensors.items():
        if tensor.shape != current[name].shape:
            shapes = f"has shape {tuple(tensor.shape)}, expected {tuple(current[name].shape)}"
            raise UserError(
                f"{path} does not fit this model: {name} {shapes}. It was trained for another vision encoder, "
                "--mm_vision_select_layer or language model"
            )
    projector.load_state_dict(current | tensors)


def _short(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name
