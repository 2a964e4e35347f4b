"""The record of a stage: what is written when it begins, and compared with the run before it goes on.

runs/NAME/config.json holds for each stage its flags, the facts of the plan and what the projector was trained between.
data.json beside its checkpoints holds the fingerprint of its data. The test that captions hold out belongs to that
data: both are written together, the test first, and anew until the stage has a checkpoint.
"""

import json
import shutil

from clips.common import rundir
from clips.common.errors import UserError
from clips.common.files import read_json, write_atomically, write_json
from mllm.data.captions import TEST, CaptionStore, write_test
from mllm.model.forward import can_pack
from mllm.model.tiles import llava_of
from mllm.training.build import BuiltStage
from mllm.training.config import AROUND_PROJECTOR
from mllm.training.trainer import steps_of


def record_stage(built: BuiltStage, *, write: bool) -> None:
    """Compare the stage with what its run holds, and if `write` is set, lock the run and write the record.

    Raises UserError if the run has other settings or other data, if stage 1 trained its projector between another
    encoder and language model, or if another process trains the run.
    """
    config, run_dir, stage_dir = built.config, built.run_dir, built.stage_dir
    stage = config.stage_info
    parts = {name: getattr(config, name) for name in AROUND_PROJECTOR}
    parts["vision tower's weights"] = built.vision.weights_fingerprint
    derived = {
        "vision_fingerprint": built.vision.fingerprint,
        "packed": can_pack(llava_of(built.model).config.get_text_config()),
    }
    record = {
        "trains": config.what_trains() | derived,  # a resumed run must have the same values; the rest is for people
        "facts": built.facts,
        "freeze": built.freeze,
        "projector_of": parts,
    }
    recorded = read_json(run_dir / "config.json")
    if config.takes_stage_1:
        align = recorded.get("align", {})
        before = align.get("projector_of", parts)
        rundir.refuse(
            rundir.changed({name: before.get(name) for name in parts}, parts),
            f"stage 1 in {run_dir} trained its projector with other settings",
            "Run stage 1 again under another --output_dir, or name a projector with --pretrain_mm_mlp_adapter",
        )
        trained = align.get("trains", {})
        share = trained.get("held_out") or 0.0
        if trained.get("data_path") == config.data_path and share < (config.held_out or 0.0):
            raise UserError(
                f"stage 1 in {run_dir} held out {share:g} of {config.data_path}, so it has seen images that stage 2 "
                f"would hold out: give --held_out {share:g}, or another --output_dir"
            )
    if stage.name in recorded:
        rundir.refuse(
            rundir.changed(recorded[stage.name]["trains"], record["trains"]),
            f"{run_dir} holds a run whose stage {stage.name} has other settings",
            "Give the new run another --output_dir, or remove that directory",
        )
    has_trained = check_same_data(built)
    if not write:
        return
    stage_dir.mkdir(parents=True, exist_ok=True)
    rundir.hold(run_dir)
    store, test = built.store, run_dir / TEST
    if stage.number == 2 and isinstance(store, CaptionStore) and not (has_trained and test.is_file()):
        if store.test:
            write_test(run_dir, store.test)
        else:
            shutil.rmtree(test.parent, ignore_errors=True)
    write_json(stage_dir / rundir.DATA, built.data)
    write_json(run_dir / "config.json", recorded | {stage.name: record})
    if built.dataset.skipped:
        lines = "".join(json.dumps(problem) + "\n" for problem in built.dataset.skipped)
        write_atomically(stage_dir / "skipped.jsonl", lines)


def check_same_data(built: BuiltStage) -> bool:
    """Return True if the stage has a checkpoint or is finished; one that has neither takes other data.

    Raises UserError if the stage has trained on other data, or stage 1 on images that stage 2 would hold out. Older
    runs have no record of their data and go on.
    """
    stage_dir, run_dir, now = built.stage_dir, built.run_dir, built.data
    before = read_json(stage_dir / rundir.DATA)
    trained = max((int(path.name[5:]) for path in rundir.checkpoints(stage_dir)), default=0)
    has_trained = trained > 0 or (stage_dir / "done.json").is_file()
    changed = ""
    if before not in ({}, now) and has_trained:
        was, number = before["samples"], now["samples"]
        changed = f"{was:,} samples, now {number:,}" if was != number else f"as many, {was:,} samples"
    elif trained > steps_of(built.config, now["samples"]):
        changed = f"step {trained:,} is beyond the end with the {now['samples']:,} samples of now"
    if changed:
        raise UserError(
            f"{stage_dir} has trained on other data ({changed}): give another --output_dir to begin anew, or put the "
            "data back as it was to go on"
        )
    if built.config.takes_stage_1:
        held_out = now.get("held_out", [])
        leaked = set(held_out) & set(read_json(run_dir / "align" / rundir.DATA).get("trained_on", []))
        if leaked:
            raise UserError(
                f"stage 1 in {run_dir} has trained on {len(leaked):,} of the {len(held_out):,} images that stage 2 "
                "would hold out, because its data had other images: give --instruct.held_out 0, "
                "or another --output_dir to train both stages on the data of now"
            )
    return has_trained
