"""CLIPS: vision–language pretraining with synthetic captions (arXiv 2411.16828). Its public names are below.

    from clips import CLIPS

    model = CLIPS.from_pretrained("runs/demo")

Each name is imported at its first use, so `import clips` costs nothing. A test checks that `mllm` takes only these
names, `clips.common`, `clips.engine` and `clips.lab` from this package.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the one list of names: type checkers run it, FACE is read off its text
    from clips.config import DataConfig, Fields, RunConfig, parse_fields
    from clips.data.dataset import Dataset, open_data
    from clips.data.demo import CONCEPTS, NUMBERS, PLACES, at_place, capital, demo_split, ensure_any_demo, is_of_demo
    from clips.data.images import (
        ENDINGS,
        IMAGENET_MEAN,
        IMAGENET_STD,
        MAX_BYTES,
        MAX_PIXELS,
        decode_image,
        decoded_size,
    )
    from clips.data.importing.layouts import NAMES, expand
    from clips.data.importing.tar import read_members
    from clips.data.sample import MAX_CAPTION, BrokenSample, RawSample, flat
    from clips.data.sentences import split_sentences
    from clips.data.splits import check_readable, count_shared, held_out_images, held_out_sets, open_split, split_spec
    from clips.encoder import CLIPS
    from clips.evaluation.encode import ImageSet
    from clips.evaluation.evaluate import PROBE_SAMPLES, probe_images
    from clips.evaluation.testsets import open_test_set
    from clips.model.layers import init_weights
    from clips.model.vision import sincos_positions
    from clips.training.cli import config_from_flags, parser
    from clips.weights.foreign import NotPlain, plain_vit
    from clips.weights.hf_vit import transformers_vit
    from clips.weights.load import newest_export
    from clips.weights.open_clip import read_open_clip_config

FACE = {
    alias.name: node.module
    for node in ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
    if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("clips.")
    for alias in node.names
}
"""The module of each public name."""
__all__ = list(FACE)


def __getattr__(name: str) -> Any:
    if name not in FACE:
        raise AttributeError(f"module 'clips' has no attribute {name!r}")
    return getattr(import_module(FACE[name]), name)
