"""Profiles of several ranks: each leaves its own, and one summary tells of all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import WriteConfig
from resuming import TrainServer

from trainer.cli import main


def test_every_rank_leaves_a_profile(
    server: TrainServer, write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    done = server.train("--config", write_config(profile={"steps": [4, 7]}), ranks=2)
    assert done.code == 0, done.err
    assert done.out.count("profile    steps 4 to 7") == 1
    assert main(["profile", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = {file.name for file in (run / "profile").glob("rank-*")}
    endings = ("trace.json.gz", "memory.json", "kernels.json", "kernels.txt")
    assert names == {f"rank-{rank}.{ending}" for rank in (0, 1) for ending in endings}
    assert [(record["rank"], record["steps"]) for record in found["ranks"]] == [(0, [4, 5, 6, 7]), (1, [4, 5, 6, 7])]
    for record in found["ranks"]:
        assert 0.5 < sum(record["kind_seconds"].values()) / record["traced_seconds"] < 1.02
        # The exchange of gradients is waited for in backward, where no operator runs, and is found nevertheless.
        assert record["kind_seconds"]["communication"] > 0
        table = json.loads((run / "profile" / f"rank-{record['rank']}.kernels.json").read_text())["kernels"]
        calls = {(row["name"], row["kind"]): row["calls"] for row in table}
        assert calls["c10d::allreduce_", "communication"] >= 4
        assert calls["aten::addmm", "matmul"] == 4 * 2
        assert calls["aten::addmm", "evaluation"] == 2 * 2

    assert main(["profile", str(run)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("2 ranks, torch ")
    for rank in (0, 1):
        assert f"rank {rank} (cpu, " in text
    assert "evaluation " in text  # between steps 5 and 6
    assert "differences between ranks, per step" in text
    assert "(N = 0, 1)" in text
