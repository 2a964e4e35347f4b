"""What a LLaVA run tells people: its page of pictures and answers, its progress, its last words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny_mllm import picture

from clips.common import live
from clips.engine.log import RunLog
from mllm.data.images import ImageStore
from mllm.data.questions import Question
from mllm.evaluation.report import figures_of, write_report
from mllm.evaluation.scores import exact_match_figures

FREEZE = {"vision_tower": "frozen", "projector": "full", "language_model": "lora"}


def write_run(run: Path, right: int) -> None:
    """A finished run that answered ten questions each of two kinds, `right` of each rightly."""
    (run / "evaluation").mkdir(parents=True)
    questions, answers, lines = [], [], []
    for kind, truths in (("count", ["One", "One", "Two"]), ("where", ["At the top", "Below"])):
        for i in range(10):
            truth = truths[i % len(truths)]
            questions.append(Question(id=i, text=f"{kind} {i}?", images=(f"{i}.png",), kind=kind, answer=truth))
            answers.append(truth if i < right else "<b>no</b>")
            lines.append(
                {"question_id": i, "prompt": f"{kind} {i}?", "text": answers[-1], "image": f"{i}.png", "kind": kind,
                 "expected": truth, "correct": i < right}
            )  # fmt: skip
    figures = figures_of("answers_unseen", {"exact_match": exact_match_figures(questions, answers)}, lines)
    content = {"sets": {"answers": {}, "answers_unseen": {}}, "test_set": "answers", "figures": figures}
    (run / "evaluation" / "figures.json").write_text(json.dumps(content))
    (run / "evaluation" / "answers_unseen.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stages = {}
    for stage in ("align", "instruct"):
        facts = {"vision encoder": f"clips:{run.name}", "language model": "tiny"}
        stages[stage] = {"trains": {}, "facts": facts, "freeze": FREEZE}
        (run / stage).mkdir()
        summary = {"train_seconds": 90, "samples": 640, "samples_per_s": 7.0, "peak_memory_gb": 2.0}
        (run / stage / "done.json").write_text(json.dumps(summary | {"trained_parameters": {"projector": 2_000_000}}))
    (run / "config.json").write_text(json.dumps(stages))
    metrics = [{"kind": "train", "stage": "align", "samples": n, "loss": 3.0 / n, "step": n} for n in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    (tmp_path / "images").mkdir()
    for i in range(9):  # the tenth is not there any more
        picture(40, seed=i).save(tmp_path / "images" / f"{i}.png")
    return ImageStore(tmp_path / "images")


def test_the_page_has_answers_curves_and_right_answers_against_chance(tmp_path: Path, store: ImageStore) -> None:
    write_run(tmp_path / "runs" / "llava-clips", right=6)
    run = tmp_path / "runs" / "llava-clips"
    page = write_report(run, store, run / "evaluation", run).read_text()
    parts = ("clips:llava-clips", "<dt>answer", "align: loss", "overall</td>", "<details>")
    order = [page.index(text) for text in parts]
    assert order == sorted(order)
    # Chance: the commonest truth of each kind, seven "One" of ten and five of ten.
    row = r"<td[^>]*>overall</td><td[^>]*>60.0 \[38.7, 78.1\]</td><td[^>]*>60.0</td><td[^>]*>20</td>"
    assert re.search(row, page)
    assert page.count('class="badge') == 9, "one answer about each image that is there"
    assert "&lt;b&gt;no&lt;/b&gt;" in page
    assert "<dt>truth</dt>" in page


def test_a_slow_step_shows_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps of 128 samples printed nothing for eight minutes."""
    monkeypatch.setenv(live.LINE_SECONDS, "0")
    log = RunLog(tmp_path, 16, {}, start_step=0, active=True, report_to=(), stage="instruct")
    log.progress(8)
    log.record("train", {"step": 2, "samples": 16, "loss": 2.5})
    log.progress(16)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "instruct: 8 of 16 samples (50 %)"
    assert last.startswith("instruct: 16 of 16 samples (100 %), 0 s left, loss 2.5")
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["stage"] == "instruct"
