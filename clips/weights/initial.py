"""The weights that a run begins with (`--init-from`): the parts that they bring, and the parts that are new.

Only weights are taken, no optimizer state and no step. A part in the file brings its architecture, and the text tower
its tokenizer too; the recipe defines all other parts. init_from.json in the run directory records this for resuming.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from clips.common import rundir
from clips.common.files import write_json
from clips.common.hub import ANY_WEIGHTS, resolve
from clips.common.opening import opening
from clips.common.page import table_of
from clips.common.tensors import assign_weights, check_fits, listed
from clips.config import TRAINING_FIELDS, RunConfig
from clips.model.clips import CLIPSModel
from clips.model.text import TextTower
from clips.model.vision import VisionTower, resample_positions
from clips.recipes import RECIPES, recipe
from clips.weights.foreign import InitialWeights, kind_of
from clips.weights.load import READERS, LoadedModel, load_model

FREE = ("model.vision.image_size", *(f"{part}.{name}" for part, name in TRAINING_FIELDS.items()))
"""Fields that the recipe or `--set` may change. Positions are recomputed or resampled for another image size."""


def read_initial(name: str, what: str = "--init-from") -> InitialWeights:
    """Read the weights of a run, an export, an open_clip or official checkpoint, or a model of transformers or timm.

    `name` is a directory or a hub id; `timm:NAME` is the hub's timm/NAME.
    """
    if name.startswith("timm:"):
        place = name.removeprefix("timm:")
        directory = resolve(place if Path(place).is_dir() or "/" in place else f"timm/{place}", what)
        kind: str | None = "timm"
    else:
        directory = resolve(name, what, ANY_WEIGHTS)
        kind = kind_of(directory)
    if kind is None:
        return _of_loaded(name, load_model(directory))
    with opening(what, directory):
        weights = READERS[kind](directory)
        _check_sizes(weights, directory)
    return dataclasses.replace(weights, source=name)


def _check_sizes(weights: InitialWeights, directory: Path) -> None:
    """Raise UserError as `check_fits` does, before the run builds a model of these sizes."""
    with torch.device("meta"):
        towers: dict[str, nn.Module] = {"visual.": VisionTower(weights.vision, 0)}
        if weights.text is not None:
            towers["text."] = TextTower(weights.text, 0, 0)
    for start, tower in towers.items():
        tensors = {n.removeprefix(start): t for n, t in weights.tensors.items() if n.startswith(start)}
        tensors.pop("proj.weight", None)
        check_fits(tower, tensors, directory)


def _of_loaded(name: str, loaded: LoadedModel) -> InitialWeights:
    config = loaded.model.config
    return InitialWeights(
        source=name, kind="this project's", vision=config.vision, text=config.text, captioner=config.captioner,
        tokenizer=loaded.tokenizer, tokenizer_kind=loaded.run.captions.tokenizer, embed_dim=config.embed_dim,
        tensors={name: tensor.detach() for name, tensor in loaded.model.state_dict().items()},
    )  # fmt: skip


def check_agrees(run: RunConfig, initial: InitialWeights) -> None:
    """Raise UserError with the fields in which `run` asks for another architecture than that of the weights."""
    changes = []
    for path, value in initial.architecture.items():
        asked = _at(run, path)
        if path != "model.captioner" or asked:  # a run may do without the captioner
            changes += rundir.changed({path: value}, {path: asked})
    rundir.refuse(
        [line for line in changes if not line.startswith(FREE)],
        f"--set asks for another architecture than that of the weights in --init-from {initial.source}",
        "Leave those --set out, or begin with other weights",
    )


def _at(run: RunConfig, path: str) -> Any:
    value: Any = run.to_dict()
    for key in path.split("."):
        value = value[key]
    return value


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """The origin of each part of a run's model. It is printed, and saved as init_from.json for resuming."""

    source: str
    kind: str
    sha256: str
    architecture: dict[str, Any]
    given: dict[str, int]
    """Number of parameters of each part that came from the file."""
    new: dict[str, int]
    """Number of parameters of each part that the recipe initialises."""
    left_over: dict[str, list[str]]
    notes: list[str]

    def table(self, run: RunConfig) -> Table:
        """Return a table for the terminal that also shows what differs from the recipe of `run`."""
        title = f"begins with {self.source} ({self.kind}; weights {self.sha256[:12]})"
        rows = [(p, f"{self.given.get(p, 0):,}", f"{self.new.get(p, 0):,}") for p in self.given | self.new]
        rows += [("on the way", note, "") for note in self.notes]
        rows += [("left over", f"{what}: {listed(names)}", "") for what, names in self.left_over.items()]
        # A configuration of the user's own may have a name that is no recipe's: nothing differs from it.
        standard = recipe(run.recipe) if run.recipe in RECIPES else run
        now, before = ({path: _at(config, path) for path in self.architecture} for config in (run, standard))
        if lines := rundir.changed(before, now):
            rows.append((f"differs from {run.recipe}", ", ".join(lines), ""))
        return table_of(title, ("parameters of", "from the file", "new"), rows, names=3)

    def save(self, run_dir: Path) -> None:
        """Write init_from.json into the run directory."""
        write_json(run_dir / rundir.INIT_FROM, dataclasses.asdict(self))


PARTS = {
    "vision tower": ("visual.",),
    "text tower": ("text.",),
    "projections": ("visual.proj.", "text.proj."),
    "captioner": ("captioner.",),
    "logit scale": ("logit_scale",),
}
"""Prefixes of tensor names by part of the model; if two parts match a name, the later one counts."""


def initialise(model: CLIPSModel, initial: InitialWeights) -> Beginning:
    """Load the weights into `model`, whose other parts stay as they are, and return the origin of each part."""
    tensors = dict(initial.tensors)
    left_over = dict(initial.left_over)
    notes = list(initial.notes)
    vision = model.config.vision
    image_size = initial.architecture["model.vision"]["image_size"]
    if "visual.pos_embed" in tensors and vision.image_size != image_size:
        grid = vision.image_size // vision.patch_size
        tensors["visual.pos_embed"] = resample_positions(tensors["visual.pos_embed"], grid, vision.prefix_tokens)
        notes.append(f"positions resampled from {image_size} px to {vision.image_size} px")

    state = model.state_dict()
    for part, starts in PARTS.items():  # parts that the run lacks altogether
        unused = [name for name in tensors if name.startswith(starts) and name not in state]
        if unused and not any(name.startswith(starts) for name in state):
            left_over[f"{part}, which this run does not have"] = unused
            tensors = {name: tensor for name, tensor in tensors.items() if name not in unused}

    may_be_new = []
    if "model.captioner" not in initial.architecture:
        may_be_new.append("captioner.")
    if not any(name.startswith("text.") for name in tensors):
        may_be_new.append("text.")
    if "logit_scale" not in initial.tensors:
        may_be_new += ["text.proj.", "visual.proj.", "logit_scale"]
    new = {name: state[name] for name in state if name not in tensors and name.startswith(tuple(may_be_new))}
    assign_weights(model, tensors | new, initial.source)
    return Beginning(
        source=initial.source, kind=initial.kind, sha256=initial.sha256, architecture=initial.architecture,
        given=_parameters(tensors), new=_parameters(new), left_over=left_over, notes=notes,
    )  # fmt: skip


def _parameters(tensors: dict[str, Tensor]) -> dict[str, int]:
    amounts: dict[str, int] = {}
    for name, tensor in tensors.items():
        *_, part = (part for part, starts in PARTS.items() if name.startswith(starts))
        amounts[part] = amounts.get(part, 0) + tensor.numel()
    return amounts
