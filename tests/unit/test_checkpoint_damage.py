"""Damaged checkpoints: found, named, put aside, and the run goes on from the one before."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import Train, WriteConfig, few, tiny_config
from resuming import TrainServer, assert_same_end

from trainer.checkpoint.folder import open_folder
from trainer.checkpoint.manifest import FORMAT, Damaged, Manifest, checksum
from trainer.config import load_config

CHANGES = {
    "model": {"name": "vectors_model:Normed", "args": {"dropout": 0.2}},
    "train": {"steps": 12, "batch_size": 12},
    "eval": {"every": 2},
    "checkpoint": {"every": 2, "keep_every": 2},
}
FILE, MANIFEST = "rank-00000.safetensors", "manifest.json"


@pytest.fixture(scope="module")
def train(server: TrainServer) -> Train:
    return server.train


@pytest.fixture(scope="module")
def quiet(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs, with all of its checkpoints."""
    folder = tmp_path_factory.mktemp("quiet")
    (folder / "quiet.yaml").write_text(yaml.safe_dump(tiny_config(folder / "run", **CHANGES)))
    assert train("--config", folder / "quiet.yaml").code == 0
    return folder / "run"


@pytest.fixture
def run(quiet: Path, tmp_path: Path) -> Path:
    """The same run as it was after step 8."""
    folder = shutil.copytree(quiet, tmp_path / "run", symlinks=True)
    for step in (10, 12):
        shutil.rmtree(named(folder, step))
    return folder


def named(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def grow(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"0")


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def from_the_future(file: Path) -> None:
    content = {**json.loads(file.read_bytes())["content"], "format": FORMAT + 1}
    text = json.dumps(content, separators=(",", ":"))
    file.write_text(f'{{"checksum": "{checksum(text.encode())}", "content": {text}}}\n')


def halve(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def make_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


# What is done to a checkpoint's folder, and what is said of it.
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut by a byte": (lambda at: cut(at / FILE), rf"{FILE} has \d+ bytes instead of \d+"),
    "a byte longer": (lambda at: grow(at / FILE), rf"{FILE} has \d+ bytes instead of \d+"),
    "a bit of a header": (lambda at: flip(at / FILE, 30), f"{FILE} does not match its checksum"),
    "a bit of a tensor": (lambda at: flip(at / FILE, -5), f"{FILE} does not match its checksum"),
    "no file": (lambda at: (at / FILE).unlink(), f"{FILE} is missing"),
    "a folder for a file": (lambda at: make_a_folder(at / FILE), f"{FILE} .*"),
    "nothing": (empty, "it has no manifest"),
    "no manifest": (lambda at: (at / MANIFEST).unlink(), "it has no manifest"),
    "a bit of the manifest": (lambda at: flip(at / MANIFEST, -9), "the manifest .*"),
    "a bit of its checksum": (lambda at: flip(at / MANIFEST, 16), "the manifest does not match its checksum"),
    "an empty manifest": (lambda at: (at / MANIFEST).write_bytes(b""), "the manifest is not readable"),
    "half a manifest": (lambda at: halve(at / MANIFEST), "the manifest is not readable"),
    "garbage": (lambda at: (at / MANIFEST).write_bytes(b"\xff\x00" * 99), "the manifest is not readable"),
    "other JSON": (lambda at: (at / MANIFEST).write_bytes(b"[1]"), "the manifest is not readable"),
    "a folder for the manifest": (
        lambda at: make_a_folder(at / MANIFEST),
        "the manifest cannot be read: .*directory.*",
    ),
    "another format": (
        lambda at: from_the_future(at / MANIFEST),
        f"the manifest has format {FORMAT + 1}, this version reads {FORMAT}",
    ),
}


@pytest.mark.parametrize(
    "name",
    few(DAMAGES, "cut by a byte", "a bit of a tensor", "nothing", "half a manifest"),
)
def test_a_damaged_checkpoint_is_put_aside(
    name: str, quiet: Path, run: Path, train: Train, write_config: WriteConfig
) -> None:
    damage, reason = DAMAGES[name]
    damage(named(run, 8))
    left = tree(named(run, 8))
    code, out, err = train("--config", write_config(**CHANGES))
    assert (code, err) == (0, "")
    aside = run / "checkpoints" / "damaged-step-00000008"
    said = [line for line in out.splitlines() if line.startswith("skipped")]
    assert len(said) == 1
    assert re.fullmatch(rf"skipped the checkpoint of step 8: {reason} \(now {aside}\)", said[0])
    assert "continuing from step 6" in out
    assert tree(aside) == left
    assert_same_end(run, quiet, aside=[aside.name])


def test_the_newest_good_one_counts(quiet: Path, run: Path, train: Train, write_config: WriteConfig) -> None:
    cut(named(run, 8) / FILE)
    empty(named(run, 6))
    code, out, err = train("--config", write_config(**CHANGES))
    assert (code, err) == (0, "")
    assert re.search(rf"step 8: {FILE} has .*step 6: it has no manifest .*continuing from step 4", out, re.DOTALL)
    assert_same_end(run, quiet, aside=["damaged-step-00000008", "damaged-step-00000006"])


def test_without_a_good_checkpoint_nothing_is_started_or_deleted(
    run: Path, train: Train, write_config: WriteConfig
) -> None:
    damages = {8: "no file", 6: "a bit of a tensor", 4: "half a manifest", 2: "nothing"}
    for step, name in damages.items():
        DAMAGES[name][0](named(run, step))
    left = tree(run)
    code, _, err = train("--config", write_config(**CHANGES))
    assert code == 2
    *told, last = err.splitlines()
    assert len(told) == 4
    for line, (step, name) in zip(told, damages.items(), strict=True):
        assert re.fullmatch(rf"error: .*checkpoint.resume: '{named(run, step)}': {DAMAGES[name][1]}", line)
    assert re.search("checkpoint.resume: no checkpoint is good, and starting anew would lose the run", last)
    assert tree(run) == left
    assert {path.name for path in (run / "checkpoints").glob("*")} >= {named(run, step).name for step in damages}


def test_a_file_in_the_place_of_a_checkpoint(quiet: Path, run: Path, train: Train, write_config: WriteConfig) -> None:
    """It is none, so nobody is warned; and it is not in the way."""
    shutil.rmtree(named(run, 8))
    named(run, 8).write_text("what a clumsy copy left")
    code, out, err = train("--config", write_config(**CHANGES))
    assert (code, err) == (0, "")
    assert "continuing from step 6" in out
    assert (run / "checkpoints" / "damaged-step-00000008").read_text() == "what a clumsy copy left"
    assert_same_end(run, quiet, aside=["damaged-step-00000008"])


def test_reading_results_passes_over_damaged_ones(
    run: Path, write_config: WriteConfig, caplog: pytest.LogCaptureFixture
) -> None:
    flip(named(run, 8) / FILE, -5)
    left = tree(run)
    with caplog.at_level(logging.WARNING):
        assert open_folder(load_config(str(write_config(**CHANGES)))).newest().step == 6
    assert caplog.messages == [f"skipped '{named(run, 8)}': {FILE} does not match its checksum"]
    assert tree(run) == left


def test_a_manifest_with_any_bit_flipped_is_damaged_or_says_the_same(quiet: Path) -> None:
    data = (named(quiet, 2) / MANIFEST).read_bytes()
    manifest = Manifest.from_bytes(data)
    same = 0
    for position in range(0, len(data), 5):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        try:
            same += Manifest.from_bytes(bytes(changed)) == manifest
        except Damaged:
            continue
        else:
            assert Manifest.from_bytes(bytes(changed)) == manifest
    assert same <= 3  # such as another kind of space between two words
