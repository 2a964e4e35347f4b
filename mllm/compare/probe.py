"""Metrics of the encoders themselves: a linear probe on their tokens, and the metrics of their pretraining runs.

They are in percent, as in clips/.
"""

from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from clips import (
    PROBE_SAMPLES,
    DataConfig,
    ImageSet,
    decode_image,
    held_out_sets,
    open_test_set,
    probe_images,
)
from clips.common.files import read_json, write_json
from clips.common.rundir import read_evaluations
from mllm.compare.analysis import PROBE
from mllm.compare.commands import stage_config
from mllm.compare.comparison import Comparison, EncoderRun
from mllm.encoders.encoder import VisionEncoder
from mllm.encoders.registry import image_pixels
from mllm.training.build import encoder_of

Labelled = list[tuple[bytes, str]]
"""Encoded images with their classes."""
DEMO = DataConfig(train="demo")


def measure_encoders(comparison: Comparison, device: torch.device) -> dict[EncoderRun, dict[str, dict[str, Any]]]:
    """Return for each run and metric its value, chance and number of samples, and the name of an extra test set.

    The linear probe is measured here on the demo, in the same way for every encoder. Retrieval and zero-shot come from
    the encoder's run directory (evaluation*.json), which random, blind and foreign encoders do not have.
    """
    measured, on_demo = {}, comparison.is_demo
    train, tests = [], {}
    if on_demo:
        train = _labelled("train", PROBE_SAMPLES)
        tests = {PROBE if name == "test" else f"{name}/{PROBE}": _labelled(name, None) for name in held_out_sets(DEMO)}
    for run in tqdm(comparison.runs, desc="linear probes", unit="encoder", disable=None if on_demo else True):
        metrics: dict[str, dict[str, Any]] = {}
        for name, evaluation in read_evaluations(run.pretraining_run).items() if run.pretraining_run else ():
            if name == "evaluation":
                metrics |= evaluation["metrics"]
            else:
                other = {"test_set": evaluation["test_set"]}
                metrics |= {
                    f"{evaluation['test_set']}: {metric}": f | other for metric, f in evaluation["metrics"].items()
                }
        if on_demo:
            path = comparison.output / "probes" / f"{run.fingerprint()[:32]}.json"
            probes = read_json(path)
            if not tests.keys() <= probes.keys():
                encoder = encoder_of(stage_config(comparison, run, 2))
                probed = probe_images(_image_set(encoder, train, device))
                by_test = {name: probed(_image_set(encoder, samples, device)) for name, samples in tests.items()}
                probes = {name: asdict(metric) for name, metric in by_test.items() if metric}
                path.parent.mkdir(exist_ok=True)
                write_json(path, probes)
            metrics |= {name: probes[name] for name in tests}
        measured[run] = metrics
    return measured


def _labelled(split: str, limit: int | None) -> Labelled:
    """Return image and class of the labelled scenes among the first `limit` scenes of a fixed shuffle of the demo."""
    samples, _ = open_test_set(DEMO, split)
    chosen = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()[:limit]
    read = [samples.read(index) for index in sorted(chosen)]
    return [(sample.image, sample.label) for sample in read if sample.label is not None]


@torch.inference_mode()
def _image_set(encoder: VisionEncoder, labelled: Labelled, device: torch.device) -> ImageSet:
    model: Any = encoder.model  # the `to` of transformers is typed as a function of the model
    model.to(device)
    pooled = []
    for start in range(0, len(labelled), 64):
        images = [decode_image(image) for image, _ in labelled[start : start + 64]]
        pixels = torch.cat([image_pixels(encoder.image_processor, image)[:1] for image in images])  # without tiles
        pooled.append(encoder.features(pixels.to(device, model.dtype)).mean(1).float().cpu())
    features, count = torch.cat(pooled), len(labelled)
    return ImageSet(features, features, [{}] * count, [label for _, label in labelled], list(range(count)), [])
