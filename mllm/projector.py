"""The projector between vision encoder and language model: transformers' own class, LLaVA's file format.

`LlavaMultiModalProjector` is linear_1 → activation → linear_2. Two kinds fit into it exactly:

    mlp2x_gelu   activation "gelu"; linear_1 and linear_2 are LLaVA's mm_projector.0 and mm_projector.2
    linear       activation "linear" (identity) and linear_2 fixed to the identity matrix with zero bias;
                 linear_1 is LLaVA's mm_projector

Shapes: W width of an image token · D width of a word embedding · n rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from clips.errors import UserError
from clips.weights import read_weights, write_weights

ProjectorKind = Literal["linear", "mlp2x_gelu"]

ACTIVATION: dict[str, str] = {"mlp2x_gelu": "gelu", "linear": "linear"}
"""Projector kind → `LlavaConfig.projector_hidden_act`."""

LLAVA_NAMES = {
    "mlp2x_gelu": {"linear_1": "model.mm_projector.0", "linear_2": "model.mm_projector.2"},
    "linear": {"linear_1": "model.mm_projector"},
}
"""Projector kind → our layer → its name in LLaVA's mm_projector files."""

LARGEST_FACTOR, RANDOM_SHARE = 10.0, 0.1
"""Of `start_from_captions`."""

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


def save_projector(projector: LlavaMultiModalProjector, path: Path) -> None:
    """Write LLaVA's `mm_projector` file: safetensors, or with the suffix .bin a torch file of plain tensors."""
    tensors = {
        f"{LLAVA_NAMES[projector_kind(projector)][name]}.{part}": parameter.detach().to("cpu").clone()
        for name, layer in trainable_layers(projector).items()
        for part, parameter in layer.named_parameters()
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if Path(path).suffix == ".bin":
        torch.save(tensors, path)
    else:
        write_weights(tensors, path)


@torch.no_grad()
def load_projector(projector: LlavaMultiModalProjector, path: Path) -> None:
    """Copy a projector file into `projector`: LLaVA's names or transformers', .safetensors or .bin.

    A directory stands for the mm_projector file in it. Raises UserError when the file holds pickled code, another
    kind of projector, or other widths (with both shapes).
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("mm_projector.safetensors", "mm_projector.bin") if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} holds no mm_projector.safetensors or mm_projector.bin")
        path = found[0]
    marked = {n: t for n, t in read_weights(path).items() if "mm_projector" in n or "multi_modal_projector" in n}
    tensors = {_short(name): tensor for name, tensor in (marked or read_weights(path)).items()}
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
            raise UserError(
                f"{path} holds no linear or mlp2x_gelu projector; its tensors: {', '.join(sorted(tensors))}"
            )
        if kind == "linear" and _is_identity(tensors):
            found_kind, tensors = "linear", {n: t for n, t in tensors.items() if n.startswith("linear_1.")}
    if found_kind != kind:
        raise UserError(f"{path} holds a {found_kind} projector, this model has {kind}: set --mm_projector_type")
    own = projector.state_dict()
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, this model needs {tuple(own[name].shape)} (outputs, "
                "inputs): it was trained for another vision encoder, layer choice or language model"
            )
    projector.load_state_dict(own | tensors)


def _short(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name


def _is_identity(tensors: dict[str, Tensor]) -> bool:
    weight, bias = tensors["linear_2.weight"].float(), tensors["linear_2.bias"]
    return weight.shape[0] == weight.shape[1] and torch.equal(weight, torch.eye(len(weight))) and not bias.any()


# ---------------------------------------------------------------------------------------------- a closed-form start


@torch.no_grad()
def least_squares_init(
    projector: LlavaMultiModalProjector,
    features: Tensor,
    targets: Tensor,
    *,
    ridge: float = 1e-2,
    seed: int = 0,
) -> float:
    """Start the projector at the ridge regression from `features` [n, W] to `targets` [n, D]; returns R².

    For example: patch features, and for each the mean word embedding of its image's caption.
    `ridge` is relative to the mean variance of the regressors. `linear` gets the solution itself. For `mlp2x_gelu`,
    linear_1 becomes D/2 directions of the whitened features (the principal axes first, then random ones) each with
    both signs, and linear_2 the regression on its activations. gelu(z) − gelu(−z) = z, so wherever W ≤ D/2 every
    linear map is within reach and the fit is at least as good as the linear one.
    """
    x, y = features.double(), targets.double()
    if x.shape[1:] != (projector.linear_1.in_features,) or y.shape != (len(x), projector.linear_1.out_features):
        raise ValueError(
            f"features {tuple(x.shape)} and targets {tuple(y.shape)} do not fit a projector of "
            f"{projector.linear_1.in_features} → {projector.linear_1.out_features}"
        )
    if projector_kind(projector) == "mlp2x_gelu":
        weight, bias = _two_signed_directions(x, projector.linear_1.out_features, seed)
        _assign(projector.linear_1, weight, bias)
        x, layer = projector.act(x @ weight.T + bias), projector.linear_2
    else:
        layer = projector.linear_1
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    centred = x - x_mean
    gram = centred.T @ centred / len(x)
    gram += (ridge * gram.diagonal().mean() + 1e-8) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram, centred.T @ (y - y_mean) / len(x)).T
    bias = y_mean - weight @ x_mean
    _assign(layer, weight, bias)
    residual = y - (x @ weight.T + bias)
    return 1 - (residual.square().sum() / (y - y_mean).square().sum()).item()


def caption_targets(captions: Sequence[Sequence[int]], embeddings: Tensor) -> Tensor:
    """[n, D]: for each caption (token ids) the mean of its word embeddings, weighted by inverse document frequency.

    With equal weights the words of every sentence ("a", "at the") make up most of the mean; a word of every caption
    weighs nothing here. embeddings [V, D]. Raises ValueError for a caption without a token.
    """
    if not all(captions):
        raise ValueError("a caption without a token has no mean embedding")
    seen = Counter(token for caption in captions for token in set(caption))
    weight = {token: math.log(len(captions) / count) + 1e-6 for token, count in seen.items()}
    targets = torch.empty(len(captions), embeddings.shape[1])
    for row, caption in zip(targets, captions, strict=True):
        weights = torch.tensor([weight[token] for token in caption], device=embeddings.device)
        row.copy_((weights / weights.sum()) @ embeddings[list(caption)].float())
    return targets


@torch.no_grad()
def start_from_captions(
    projector: LlavaMultiModalProjector,
    features: Tensor,
    captions: Sequence[Sequence[int]],
    embeddings: Tensor,
    *,
    seed: int = 0,
) -> float:
    """Start the projector where image tokens look like the words of their captions; returns the regression's R².

    features [n, N, W] of n images with their captions (token ids), embeddings [V, D]. Every token of an image is
    regressed on the same target; what stands in a patch and what does not averages out over images, so a patch comes
    to lie near the words for what it shows. The fitted tokens are then given the mean and the variance of all word
    embeddings (a regression shrinks them to a tenth of what the language model is used to), `RANDOM_SHARE` of the
    variance as a random map: captions tell nothing about much of the features, and the regression drops that.
    """
    rows = features.flatten(0, 1)
    targets = caption_targets(captions, embeddings).repeat_interleave(features.shape[1], dim=0)
    r2 = least_squares_init(projector, rows, targets.to(rows.device), ridge=1e-3, seed=seed)
    _match_embeddings(projector, rows, embeddings, seed)
    return r2


def _match_embeddings(projector: LlavaMultiModalProjector, rows: Tensor, embeddings: Tensor, seed: int) -> None:
    """Scale and shift the last trained layer's outputs over `rows` [n, W], and add the random map to it."""
    *before, last = trainable_layers(projector).values()
    inputs = projector.act(before[0](rows.to(last.weight.dtype))).float() if before else rows.float()
    words_spread = _spread(embeddings.float())
    random = torch.randn(last.weight.shape, generator=torch.Generator().manual_seed(seed)).to(inputs.device)
    weight = torch.zeros_like(random)
    for part, share in ((last.weight.float(), 1 - RANDOM_SHARE), (random, RANDOM_SHARE)):
        # At most so much: outputs that hardly differ (an encoder without image information) would become noise.
        factor = share**0.5 * words_spread / torch.maximum(_spread(inputs @ part.T), words_spread / LARGEST_FACTOR)
        weight += factor * part
    _assign(last, weight, embeddings.float().mean(dim=0) - weight @ inputs.mean(dim=0))


def _spread(x: Tensor) -> Tensor:
    """Root mean square distance of the rows from their mean."""
    return (x - x.mean(dim=0)).square().sum(dim=-1).mean().sqrt()


def _two_signed_directions(x: Tensor, hidden: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weight [hidden, W] and bias [hidden] whose outputs come in pairs ±z, each of unit variance over `x`."""
    mean = x.mean(dim=0)
    centred = x - mean
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(x))  # ascending
    whiten = (axes / (variances.clamp_min(variances[-1] * 1e-6) + 1e-8).sqrt()).T.flip(0)  # [W, W], largest axis first
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(hidden // 2, len(whiten), generator=generator, dtype=x.dtype).to(x.device)
    mix /= mix.norm(dim=1, keepdim=True)
    axes_kept = min(hidden // 2, len(whiten))
    mix[:axes_kept] = torch.eye(len(whiten), dtype=x.dtype, device=x.device)[:axes_kept]
    half = mix @ whiten
    weight = torch.zeros(hidden, x.shape[1], dtype=x.dtype, device=x.device)
    weight[: 2 * len(half)] = torch.cat([half, -half])
    return weight, -weight @ mean


def _assign(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
