"""After the last step: measure on the test split, export, write the report, and say what to do next."""

import shlex
from pathlib import Path

import torch

from clips.common.errors import never_in_the_way
from clips.common.live import say, say_next
from clips.common.paths import unused, without_secrets
from clips.common.report import write_report
from clips.common.rundir import REPORT, checkpoints, chosen_checkpoint, has_report, read_evaluations, weights_of
from clips.common.tensors import assign_weights
from clips.config import DataConfig, RunConfig
from clips.data.splits import deciding_set, open_split, split_spec
from clips.data.tokenizer import CaptionTokenizer
from clips.engine import checkpoint
from clips.evaluation.evaluate import evaluate, nearest_texts
from clips.evaluation.results import metrics_table, missing_of
from clips.evaluation.testsets import open_test_set
from clips.model.clips import CLIPSModel
from clips.weights.card import DRAWINGS
from clips.weights.export import FORMATS, export_all, sample_inputs
from clips.weights.open_clip import open_clip_lacks


def finish_run(run: RunConfig, model: CLIPSModel, tokenizer: CaptionTokenizer, run_dir: Path) -> None:
    """Evaluate, export and report. Every part can be repeated, so an interrupted end is simply run again.

    `model` holds the weights of the newest checkpoint, and takes those of the chosen one. Each result records its
    weights and counts only for them. One process does this, without a process group, because a large test set takes
    longer than ranks would wait.
    """
    chosen = chosen_checkpoint(run_dir)
    weights = None if chosen is None else weights_of(chosen)
    if chosen is not None and chosen != checkpoints(run_dir)[0]:
        assign_weights(model, checkpoint.load(chosen, "checkpoint").weights(), chosen)
    if chosen is not None and run.train.choose == "best" and split_spec(run.data, "val"):
        count = min(len(open_split(run.data, "val", need_long=False)), run.eval.max_images)
        say(f"the best checkpoint on {count:,} validation images is {chosen.name}, which is exported")
    size = run.phases[-1].image_size
    held_out = ("test", "val")
    split = next((name for name in held_out if split_spec(run.data, name)), None)
    if split is not None:
        out = run_dir / "evaluation.json"
        metrics = evaluate(model, tokenizer, run, split, full=True, image_size=size, out=out, checkpoint=weights)
        say(metrics_table(metrics, f"{split} split", first=split, missing=missing_of(run.data, split)))
    images, texts = sample_inputs(open_split(run.data, split or "train", need_long=False), size)
    differences = export_all(
        model, run, tokenizer, run_dir / "export", images, texts,
        image_size=size, evaluations=read_evaluations(run_dir).values(), checkpoint=weights,
    )  # fmt: skip
    for name, difference in differences.items():
        say(f"export/{name}: equal to the trained model within {difference:.1e} on {len(images)} images")
    if reason := open_clip_lacks(run.model):
        say(f"export/open_clip: not written: {reason}")
    shown = deciding_set(run.data)
    with never_in_the_way(f"the report of {run_dir} is not written; the run itself is finished"):
        items = open_test_set(run.data, shown)[0] if shown else ()
        sizes = {"image_size": size, "batch_size": run.eval.batch_size, "workers": run.data.workers}
        cards = nearest_texts(model, tokenizer, items, **sizes) if items else ()
        facts = f"{run.recipe} · {run.samples:,} samples"
        facts += f" · {DRAWINGS}" if run.data.train == "demo" else ""
        write_report(run_dir, read_evaluations(run_dir).values(), cards, facts=facts)
    print_next(run.data, run_dir)


def print_next(data: DataConfig, run_dir: Path) -> None:
    """Print what the run has written, and the command that trains a LLaVA-style model on it and on its captions."""
    report = f"{REPORT}, " if has_report(run_dir) else ""
    formats = ", ".join(name for name in FORMATS if (run_dir / "export" / name).is_dir())
    evaluation = "evaluation.json, " if (run_dir / "evaluation.json").is_file() else ""  # a run may hold nothing out
    say(f"{run_dir} holds the finished run: {report}{evaluation}metrics.jsonl, export/ ({formats})")
    words = ["--vision", f"clips:{run_dir}"]
    if data.train != "demo":
        first = data.mix[0] if data.mix else data
        words += ["--output_dir", str(unused(run_dir.with_name(f"llava-{run_dir.name}")))]
        words += ["--data_path", data.mix[0].data if data.mix else data.train]
        root = first.image_root or data.image_root
        words += ["--image_folder", root] if root else []
        words += ["--test_data", data.test] if data.test else ["--key", data.key] if data.key else []
        words += [] if torch.cuda.is_available() else ["--small"]
    say_next(without_secrets(f"bash scripts/train_llava.sh {shlex.join(words)}"))
