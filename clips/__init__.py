"""CLIPS: vision–language pretraining with synthetic captions (arXiv 2411.16828). What others may use of it stands here.

    from clips import CLIPS

    model = CLIPS.from_pretrained("runs/demo")

Each name is imported when it is first asked for, so that `import clips` costs nothing. `mllm` takes from this package
only these names and `clips.common` (a test).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

FACE = {
    # a trained encoder, and where it lies
    "CLIPS": "clips.encoder",
    "newest_export": "clips.weights.load",
    # data: what a sample is, decoded within limits
    "BrokenSample": "clips.data.sample",
    "RawSample": "clips.data.sample",
    "StoredSample": "clips.data.sample",
    "IMAGENET_MEAN": "clips.data.images",
    "IMAGENET_STD": "clips.data.images",
    "MAX_BYTES": "clips.data.images",
    "MAX_PIXELS": "clips.data.images",
    "decode_image": "clips.data.images",
    "Source": "clips.data.sources",
    "open_source": "clips.data.sources",
    "WholeFiles": "clips.data.ahead",
    "stamp": "clips.data.sidecar",
    "script_of": "clips.data.check",
    "split_sentences": "clips.data.sentences",
    "read_members": "clips.data.tar",
    "built_as": "clips.data.built",
    "ensure_built": "clips.data.built",
    # the demo's world
    "BACKGROUNDS": "clips.data.demo",
    "CONCEPTS": "clips.data.demo",
    "NUMBERS": "clips.data.demo",
    "PLACES": "clips.data.demo",
    "demo_split": "clips.data.demo",
    "ensure_any_demo": "clips.data.demo",
    # what a pretraining run is: configuration, flags
    "DataConfig": "clips.config",
    "Fields": "clips.config",
    "RunConfig": "clips.config",
    "difference": "clips.config",
    "parse_fields": "clips.config",
    "config_from_flags": "clips.training.cli",
    "parser": "clips.training.cli",
    # measuring an encoder
    "ImageSet": "clips.evaluation.encode",
    "KarpathySet": "clips.evaluation.testsets",
    "held_out_sets": "clips.data.splits",
    "PROBE_SAMPLES": "clips.evaluation.evaluate",
    "open_test_set": "clips.evaluation.testsets",
    "probe_images": "clips.evaluation.evaluate",
    # an image tower taken apart, and as transformers has it
    "NotPlain": "clips.weights.plain_vit",
    "init_weights": "clips.model.layers",
    "plain_vit": "clips.weights.plain_vit",
    "read_open_clip_config": "clips.weights.open_clip",
    "sincos_positions": "clips.model.vision",
    "transformers_vit": "clips.weights.hf_vit",
}

if TYPE_CHECKING:  # the same for type checkers and editors; a test compares the two
    from clips.config import DataConfig, Fields, RunConfig, difference, parse_fields
    from clips.data.ahead import WholeFiles
    from clips.data.built import built_as, ensure_built
    from clips.data.check import script_of
    from clips.data.demo import BACKGROUNDS, CONCEPTS, NUMBERS, PLACES, demo_split, ensure_any_demo
    from clips.data.images import IMAGENET_MEAN, IMAGENET_STD, MAX_BYTES, MAX_PIXELS, decode_image
    from clips.data.sample import BrokenSample, RawSample, StoredSample
    from clips.data.sentences import split_sentences
    from clips.data.sidecar import stamp
    from clips.data.sources import Source, open_source
    from clips.data.splits import held_out_sets
    from clips.data.tar import read_members
    from clips.encoder import CLIPS
    from clips.evaluation.encode import ImageSet
    from clips.evaluation.evaluate import PROBE_SAMPLES, probe_images
    from clips.evaluation.testsets import KarpathySet, open_test_set
    from clips.model.layers import init_weights
    from clips.model.vision import sincos_positions
    from clips.training.cli import config_from_flags, parser
    from clips.weights.hf_vit import transformers_vit
    from clips.weights.load import newest_export
    from clips.weights.open_clip import read_open_clip_config
    from clips.weights.plain_vit import NotPlain, plain_vit

__all__ = list(FACE)


def __getattr__(name: str) -> Any:
    if name not in FACE:
        raise AttributeError(f"module 'clips' has no attribute {name!r}")
    return getattr(import_module(FACE[name]), name)
