"""Write a finished stage: its projector, after stage 2 also adapter, model and card, and last of all done.json."""

import shlex
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from clips import is_of_demo
from clips.common.errors import UserError, never_in_the_way
from clips.common.files import STAMP, read_json, write_json
from clips.common.hub import is_hub_id
from clips.common.live import say, say_next
from clips.common.page import save_plot
from clips.common.plots import curves_plot
from clips.common.report import curves
from mllm.data.captions import TEST, is_captions
from mllm.data.demo import IMAGES, QUESTIONS
from mllm.encoders.encoder import VisionEncoder
from mllm.model.llava import save_model
from mllm.model.projector import save_projector
from mllm.model.quantize import dequantize
from mllm.model.tiles import llava_of, newline_of
from mllm.training.build import PROJECTOR, BuiltStage, merge_lora, merge_quantized_lora
from mllm.training.recipes import STAGES

OF_DEMO = "; drawings of several artists (OpenMoji and others, some under CC BY-SA 4.0), no evidence about photographs"
"""Added to the demo's data on a model's card."""


def write_results(built: BuiltStage, summary: dict[str, Any]) -> None:
    """Write the projector, after stage 2 also adapter and model, and last done.json, which marks the stage as done.

    Then the stage's checkpoints are removed.
    """
    config = built.config
    model: Any = built.model  # a PeftModel, if there are adapters
    run_dir = built.run_dir
    stage_dir = built.stage_dir
    llava: Any = llava_of(model)  # PreTrainedModel.to is annotated without its `self`
    save_projector(llava.model.multi_modal_projector, stage_dir / PROJECTOR, newline_of(llava))
    if config.stage == 2:
        dtype = llava.lm_head.weight.dtype
        quantized = config.bits < 16
        if built.freeze["language_model"] == "lora":
            if config.llm_layers is None:  # else no model that others have fits the adapter
                model.save_pretrained(str(run_dir / "adapter"))
                extra = run_dir / "adapter" / "non_lora_trainables.bin"
                save_projector(llava.model.multi_modal_projector, extra, newline_of(llava))
            llava = merge_quantized_lora(model, dtype) if quantized else merge_lora(model)
        elif quantized:
            dequantize(llava, dtype)
        if not built.zero:  # under which every part has one precision already, as a stock model has
            llava = llava.to(dtype)
        save_model(
            llava, built.processor, run_dir / "model",
            card=card(run_dir, summary, built.vision),
            trained_on=trained_on(run_dir),
            base_model=config.model_name_or_path if is_hub_id(config.model_name_or_path) else None,
        )  # fmt: skip
    write_json(stage_dir / "done.json", summary)
    shutil.rmtree(stage_dir / "checkpoints", ignore_errors=True)
    (stage_dir / "LATEST").unlink(missing_ok=True)


def card(run_dir: Path, summary: dict[str, Any], vision: VisionEncoder) -> dict[str, str]:
    """Return the rows of the model card, {title: text}: parts, data and learning rates of both stages.

    `summary` is that of the stage which has just ended and has no done.json yet. Paths are reduced to their last part.
    """
    config = read_json(run_dir / "config.json")
    rows: dict[str, str] = {}
    for stage in ("align", "instruct"):
        if (record := config.get(stage)) is None:
            continue
        trains = record["trains"]
        facts = record["facts"]
        tower = trains["vision_tower"].partition(":")[2]
        llm = trains["model_name_or_path"]
        adapter = trains.get("llm_adapter") or ""
        data = trains["data_path"] or ""
        towers = {} if is_hub_id(tower) else {tower: vision.weights_name, vision.source: vision.weights_name}
        rows["Vision encoder"] = _without(facts["vision encoder"], towers)
        rows["Language model"] = _without(facts["language model"], {llm: Path(llm).name, adapter: Path(adapter).name})
        rows[f"Stage {stage}: data"] = _without(facts["data"], {data: Path(data).name}) + ("" if data else OF_DEMO)
        rows[f"Stage {stage}: trains"] = ", ".join(f"{part} {how}" for part, how in record["freeze"].items())
        done = summary if stage == summary["stage"] else read_json(run_dir / stage / "done.json")
        own_rate = trains["mm_projector_lr"]  # 0 keeps the projector as it is
        projector_rate = trains["learning_rate"] if own_rate is None else own_rate
        rows[f"Stage {stage}: rates"] = (
            f"learning rate {trains['learning_rate']:g}, projector {projector_rate:g}, "
            f"batch {trains['batch_size']}, {done.get('samples', '?')} samples, seed {trains['seed']}"
        )
    return rows


def trained_on(run_dir: Path) -> dict[str, str]:
    """Return for each stage "demo" or the name of its data file."""
    config = read_json(run_dir / "config.json")
    names = [stage.name for stage in STAGES.values() if stage.name in config]
    paths = {name: config[name]["trains"]["data_path"] for name in names}
    return {stage: "demo" if not path or is_of_demo(path) else Path(path).name for stage, path in paths.items()}


def _without(text: str, places: Mapping[str, str]) -> str:
    """Return `text` with every path in `places` replaced by its name; hub ids stay."""
    for place in sorted(places, key=len, reverse=True):
        if place and not is_hub_id(place):
            text = text.replace(place, places[place])
    return text


def print_next(stage: int, run_dir: Path) -> None:
    """Print what the stage has written, and the next command."""
    data = read_json(run_dir / "config.json")[STAGES[stage].name]["trains"]["data_path"]
    if stage == 1:
        say(f"{run_dir}/align/{PROJECTOR} holds the projector.")
        other = "" if data is None or is_captions(data) else ", and conversations as --data_path"
        say_next(f"the same command with --stage 2{other}")
        return
    say(f"{run_dir}/model is the finished model.")
    model = ["--model", f"{run_dir}/model"]
    images: Any = None
    with suppress(UserError):  # somebody else's file may have this name, and the stage is done
        images = read_json(Path(data).parent / STAMP).get(IMAGES) if data else None
    if isinstance(images, dict) and isinstance(images.get("test"), str):  # of build_questions.py
        words = [*model, "--questions", str(Path(data).parent / QUESTIONS), "--image-folder", images["test"]]
        say_next(f"python scripts/evaluate_llava.py {shlex.join(words)}")
    elif not (run_dir / TEST).is_file():  # else train_llava.sh goes on to measure it
        say_next(f"python scripts/chat.py {shlex.join(model)}")


def write_curves(run_dir: Path) -> None:
    """Draw the curves of each stage over its samples as curves.png. If that fails, it prints one line on stderr."""
    with never_in_the_way(f"{run_dir / 'curves.png'} is not written; nothing else is missing"):
        panels = curves(run_dir)
        if panels:
            save_plot(curves_plot(panels), run_dir / "curves.png")
