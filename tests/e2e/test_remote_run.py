"""The pretraining command on shards behind HTTP: the losses are those of local files, though the server fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from launched import SCRIPT, assert_said, lines, pictures, python, recap, run_all, write_shard
from range_server import serving

pytest.importorskip("aiohttp", reason="fsspec[http] is not installed")
pytestmark = pytest.mark.slow


def test_a_run_on_remote_shards_is_the_run_on_local_ones(tmp_path: Path) -> None:
    samples = [(picture, recap(web, long)) for picture, web, long in pictures(60)]
    for i in range(3):
        write_shard(tmp_path / f"data/{i}.tar", samples[20 * i : 20 * i + 20])

    def train(name: str, data: str) -> list[str]:
        settings = ("--set", "train.precision=fp32", "train.log_every=1", "data.workers=2")
        size = ("--samples", "96", "--output", tmp_path / "runs", "--name", name)
        return python(SCRIPT, "--debug", "--data", data, *size, *settings)

    with serving(tmp_path / "data") as server:
        server.fault = lambda method, name, before: (None, 503, "cut")[before % 3] if method == "GET" else None
        runs = {"remote": train("remote", f"{server.url}/{{0..2}}.tar"), "local": train("local", f"{tmp_path}/data")}
        done = run_all(runs, env={"CLIPS_MLLM_CACHE": str(tmp_path / "cache")})
    for one in done.values():
        assert_said(one, 0)
    assert "trying again" in done["remote"].text

    def losses(name: str) -> list[float]:
        return [line["loss"] for line in lines(tmp_path / "runs" / name) if line["kind"] == "train"]

    assert losses("remote") == losses("local") != []
    assert len([path for path in (tmp_path / "cache/remote").iterdir() if "-" in path.name]) == 3
