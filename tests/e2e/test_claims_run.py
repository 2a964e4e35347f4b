"""scripts/compare_pretraining.py with real, tiny runs: to the page, and run again."""

import json

import pytest
from lab_runs import run_main

from clips.data.demo import ensure_demo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings that name small data; the validation split is also an artist never trained on."""
    made = ensure_demo(tmp_path_factory.mktemp("data"), sizes={"train": 300, "val": 40, "test": 80})
    settings = ["phases.*.batch_size=16", "data.workers=0", *(f"data.{s}={made / s}" for s in ("train", "val", "test"))]
    return [*settings, f'data.further_tests=[{{"name": "unseen", "data": "{made / "val"}"}}]']


def test_finished_runs_are_never_run_again(tmp_path, data, monkeypatch, capsys):
    output = tmp_path / "claims"
    flags = ["claims", "--claims", "b,e", "--seeds", "2", "--samples", "64", "--output", output]
    flags += ["--llava-report", tmp_path / "none.json", "--set", *data]
    assert run_main(monkeypatch, "compare_pretraining", *flags) == 0
    result = json.loads((output / "claims.json").read_text())
    runs = [run for variant in result["variants"].values() for run in variant["runs"]]
    assert {run["name"] for run in runs} == {f"{n}-seed{s}" for n in ("web", "sentence", "captioner") for s in (0, 1)}
    for run in runs:
        assert (run["config"]["train"]["seed"], run["config"]["phases"][0]["samples"]) == (run["seed"], 64)
        assert 0 <= run["figures"]["unseen/long_r1"] <= 100
    assert result["questions"]["e"]["verdict"] == "not run"
    assert "python scripts/compare_encoders.py" in (output / "claims.html").read_text()

    capsys.readouterr()
    assert run_main(monkeypatch, "compare_pretraining", *flags) == 0
    assert "0 of 6 to run" in capsys.readouterr().err
    again = json.loads((output / "claims.json").read_text())
    assert (again["variants"], again["seconds"]) == (result["variants"], result["seconds"])
