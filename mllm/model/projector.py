"""The projector between vision encoder and language model: transformers' own class, LLaVA's file format.

`LlavaMultiModalProjector` is linear_1 → activation → linear_2. Two kinds fit into it exactly:

    mlp2x_gelu   activation "gelu"; linear_1 and linear_2 are LLaVA's mm_projector.0 and mm_projector.2
    linear       activation "linear" (identity) and linear_2 fixed to the identity matrix with zero bias;
                 linear_1 is LLaVA's mm_projector

Shapes: W width of an image token · D width of a word embedding · n rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from clips.common.errors import UserError
from clips.common.tensors import read_weights, write_weights

ProjectorKind = Literal["linear", "mlp2x_gelu"]
ACTIVATION: dict[str, str] = {"mlp2x_gelu": "gelu", "linear": "linear"}
"""Projector kind → `LlavaConfig.projector_hidden_act`."""
LLAVA_NAMES = {
    "mlp2x_gelu": {"linear_1": "model.mm_projector.0", "linear_2": "model.mm_projector.2"},
    "linear": {"linear_1": "model.mm_projector"},
}
"""Projector kind → our layer → its name in LLaVA's mm_projector files."""
NEWLINE = "model.image_newline"
PREFIXES = ("base_model.", "model.", "mm_projector.", "multi_modal_projector.")


def projector_activation(kind: str) -> str:
    """`LlavaConfig.projector_hidden_act` for a projector kind; UserError for an unknown kind."""
    if kind not in ACTIVATION:
        raise UserError(f"mm_projector_type {kind!r} is not known; choose one of: {', '.join(ACTIVATION)}")
    return ACTIVATION[kind]


def projector_kind(projector: LlavaMultiModalProjector) -> ProjectorKind:
    """Which of the two kinds a projector is."""
    return "mlp2x_gelu" if "GELU" in type(projector.act).__name__ else "linear"


def trainable_layers(projector: LlavaMultiModalProjector) -> dict[str, nn.Linear]:
    """The layers that training changes; the fixed identity of `linear` is not among them."""
    return {name: getattr(projector, name) for name in LLAVA_NAMES[projector_kind(projector)]}


@torch.no_grad()
def init_projector(projector: LlavaMultiModalProjector) -> None:
    """PyTorch's default initialisation, as LLaVA's, from torch's current random state."""
    for layer in (projector.linear_1, projector.linear_2):
        layer.reset_parameters()
    if projector_kind(projector) == "linear":
        nn.init.eye_(projector.linear_2.weight)
        nn.init.zeros_(projector.linear_2.bias)


def llava_tensors(projector: LlavaMultiModalProjector) -> dict[str, Tensor]:
    """Its weights under LLaVA's names, copied to the CPU."""
    return {
        f"{LLAVA_NAMES[projector_kind(projector)][name]}.{part}": parameter.detach().to("cpu").clone()
        for name, layer in trainable_layers(projector).items()
        for part, parameter in layer.named_parameters()
    }


def save_projector(projector: LlavaMultiModalProjector, path: Path, newline: Tensor | None = None) -> None:
    """Write LLaVA's `mm_projector` file: safetensors, or with the suffix .bin a torch file of plain tensors.

    `newline` [D], the embedding of models with tiles, goes into it under LLaVA-NeXT's name.
    """
    tensors = llava_tensors(projector)
    if newline is not None:
        tensors[NEWLINE] = newline.detach().to("cpu").clone()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if Path(path).suffix == ".bin":
        torch.save(tensors, path)
    else:
        write_weights(tensors, path)


@torch.no_grad()
def load_projector(projector: LlavaMultiModalProjector, path: Path, newline: Tensor | None = None) -> None:
    """Copy a projector file into `projector`: LLaVA's names or transformers', .safetensors or .bin.

    `newline` [D] becomes that of the file, or keeps its start if the file has none, as one of stage 1 without tiles. A
    directory means the mm_projector file in it.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / name for name in ("mm_projector.safetensors", "mm_projector.bin") if (path / name).is_file()]
        if not files:
            raise UserError(f"{path} holds no mm_projector.safetensors or mm_projector.bin")
        path = files[0]
    weights = read_weights(path)
    assign_projector(projector, weights, path)
    if newline is not None and NEWLINE in weights:  # its width is the projector's, which fits
        newline.copy_(weights[NEWLINE])


@torch.no_grad()
def assign_projector(projector: LlavaMultiModalProjector, weights: Mapping[str, Tensor], path: Path | str) -> None:
    """The same for weights that were read from `path`; those of other parts may be among them."""
    marked = {n: t for n, t in weights.items() if "mm_projector" in n or "multi_modal_projector" in n}
    tensors = {_short(name): tensor for name, tensor in (marked or weights).items()}
    kind = projector_kind(projector)
    if set(tensors) == {"weight", "bias"}:
        found_kind, tensors = "linear", {f"linear_1.{part}": tensor for part, tensor in tensors.items()}
    else:
        found_kind = "mlp2x_gelu"
        renamed = {"0": "linear_1", "2": "linear_2"}
        tensors = {
            ".".join([renamed.get(n.split(".")[0], n.split(".")[0]), n.split(".")[-1]]): t for n, t in tensors.items()
        }
        if set(tensors) != {f"linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}:
            raise UserError(f"{path} holds no projector that is known here; its tensors: {', '.join(sorted(tensors))}")
        second, bias = tensors["linear_2.weight"].float(), tensors["linear_2.bias"]
        is_identity = torch.equal(second, torch.eye(len(second))) and not bias.any()
        if kind == "linear" and is_identity:
            found_kind, tensors = "linear", {n: t for n, t in tensors.items() if n.startswith("linear_1.")}
    if found_kind != kind:
        raise UserError(f"{path} holds a {found_kind} projector, this model has {kind}: set --mm_projector_type")
    own = projector.state_dict()
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            shapes = f"has shape {tuple(tensor.shape)}, this model needs {tuple(own[name].shape)}"
            raise UserError(f"{path}: {name} {shapes}: it is of another encoder, layer choice or language model")
    projector.load_state_dict(own | tensors)


def _short(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name
