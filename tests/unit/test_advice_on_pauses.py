"""What the rules of saves and evaluations say of given figures. Runs show that it is true: test_advice_runs.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
from healthy_run import GIB, heard, said

from trainer.advice.measured import Host, Pauses, speed_up


def test_saving_behind_the_training() -> None:
    pauses = Pauses(500, "steps", False, False, 5, 5, write_seconds=0.6, copy_bytes=GIB, copy_seconds=0.1)
    found = heard("checkpoints", {"checkpoint": 0.3}, pauses=pauses)
    assert found.text == (
        "Checkpoints took 30% of the time, 600 ms each. Write them behind the training: set "
        "checkpoint.async_save=true, which takes 1.00 GiB of host memory on each rank for a copy of the state."
    )
    assert found.gain == pytest.approx(speed_up(0.25))  # the copy stays
    late = heard("checkpoints", {"checkpoint": 0.7}, pauses=replace(pauses, write_seconds=1.4))
    assert late.gain == pytest.approx(speed_up(0.7 * (1 - 0.8 / 1.4)))  # a write takes 0.8 s longer than the steps
    assert "some waiting stays" in late.text
    untried = heard("checkpoints", {"checkpoint": 0.3}, pauses=replace(pauses, copy_seconds=None))
    assert (untried.settings, untried.gain) == (found.settings, None)
    no_room = heard("checkpoints", {"checkpoint": 0.3}, pauses=pauses, host=Host(16, free_memory=GIB // 2))
    assert list(no_room.settings) == ["checkpoint.every"]
    lacking = replace(pauses, is_async=True, lacks_memory=True)
    found = heard("checkpoints", {"checkpoint": 0.3}, pauses=lacking)
    assert list(found.settings) == ["checkpoint.every"]
    assert "The host had no memory for a copy of the state" in found.text


def test_rarer_saves() -> None:
    # Every 0.6 s of training a save that takes 2 s to write: 1.4 s are waited.
    pauses = Pauses(10, "steps", True, False, 5, 5, write_seconds=2.0)
    found = heard("checkpoints", {"checkpoint": 0.7}, pauses=pauses)
    assert found.settings == {"checkpoint.every": 42}
    assert found.gain == pytest.approx(1 / 0.3 - 1, rel=0.01)
    # The copy itself takes long: 2% of the time may stay.
    found = heard("checkpoints", {"checkpoint": 0.2}, pauses=replace(pauses, write_seconds=0.3))
    assert found.settings == {"checkpoint.every": 123}
    assert found.gain == pytest.approx(0.98 / 0.8 - 1, rel=0.01)
    epochs = replace(pauses, save_every=1, save_unit="epochs", write_seconds=0.3)
    assert heard("checkpoints", {"checkpoint": 0.2}, pauses=epochs).settings == {"checkpoint.every": "13 epochs"}
    minutes = replace(pauses, save_every=0.5, save_unit="minutes", write_seconds=0.3)
    assert heard("checkpoints", {"checkpoint": 0.2}, pauses=minutes).settings == {"checkpoint.every": "6.2 minutes"}


def test_saves_of_best_results_stay() -> None:
    """Of 8 s of training there are 1.6 between two saves that are due: 6.2 times rarer, they take 2% of it."""
    pauses = Pauses(10, "steps", True, False, 10, 5, write_seconds=0.1)
    found = heard("checkpoints", {"checkpoint": 0.2}, pauses=pauses)
    assert found.settings == {"checkpoint.every": 62}
    assert found.gain == pytest.approx(10 / (8 + 1 + 1 / 6.2) - 1)
    for num_due in (0, 2):  # another interval would change little
        assert said("checkpoints", {"checkpoint": 0.2}, pauses=replace(pauses, num_due=num_due)) is None


def test_rarer_evaluations() -> None:
    pauses = Pauses(evaluate_every=100, evaluate_unit="steps", num_evaluations=5)
    found = heard("evaluations", {"evaluation": 0.4}, pauses=pauses)
    assert found.settings == {"eval.every": 600}
    assert found.gain == pytest.approx(0.5)
    assert found.text.startswith("Evaluations took 40% of the time, 800 ms each after 1.2 s of training")
    epochs = replace(pauses, evaluate_every=1, evaluate_unit="epochs")
    assert heard("evaluations", {"evaluation": 0.4}, pauses=epochs).settings == {"eval.every": "6 epochs"}


def test_intervals_end_with_the_run() -> None:
    pauses = Pauses(evaluate_every=100, evaluate_unit="steps", num_evaluations=5)
    found = heard("evaluations", {"evaluation": 0.4}, pauses=pauses, total_steps=250)
    assert found.settings == {"eval.every": 250}
    assert found.gain == pytest.approx(2 / (1.2 + 0.8 / 2.5) - 1)
    assert said("evaluations", {"evaluation": 0.4}, pauses=pauses, total_steps=100) is None
    epochs = replace(pauses, evaluate_every=1, evaluate_unit="epochs")
    found = heard("evaluations", {"evaluation": 0.4}, pauses=epochs, total_steps=2500)
    assert found.settings == {"eval.every": "3 epochs"}
    minutes = Pauses(0.5, "minutes", True, False, 5, 5, write_seconds=0.3)
    found = heard("checkpoints", {"checkpoint": 0.2}, pauses=minutes, total_steps=1000)  # of 0.1 s
    assert found.settings == {"checkpoint.every": "1.7 minutes"}
