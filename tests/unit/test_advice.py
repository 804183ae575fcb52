"""Advice as a whole: nothing without a reason, in which order, how often, and never a figure without sense."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from healthy_run import ACCUMULATING, EXCHANGE, GIB, MIB, heard, measured

from trainer.advice.adviser import RULES, Adviser, advice
from trainer.advice.measured import Batch, Exchange, Host, Loading, Measured, Memory, Pauses
from trainer.faults.pace import Straggler


def test_nothing_is_said_of_a_healthy_run() -> None:
    assert advice(measured()) == []


def test_little_of_anything_is_nothing() -> None:
    little = {"data_wait": 0.07, "h2d": 0.04, "communication": 0.1, "checkpoint": 0.03, "evaluation": 0.19}
    pauses = Pauses(num_saves=1, num_due=1, num_evaluations=1)
    exchange = Exchange(num_ranks=8, share=0.1, gradient_bytes=100 * MIB, hosts=("a",) * 8)
    assert advice(measured(little, pauses=pauses, exchange=exchange)) == []


def test_no_figure_is_without_sense() -> None:
    """Whatever is measured, nothing is divided by it where it is nothing."""
    draws = random.Random(0)

    def any_of(*values: Any) -> Any:
        return draws.choice(values)

    heard_rules = set()
    for _ in range(3000):
        part = any_of("data_wait", "h2d", "communication", "checkpoint", "evaluation", "forward")
        num_ranks = any_of(1, 2)
        found = advice(
            Measured(
                seconds=any_of(0.0, math.nan, 1.0, 1e6),
                num_steps=any_of(0, 8, 1000),
                shares={part: any_of(0.0, 0.3, 1.0)},
                steps_per_epoch=1,
                total_steps=any_of(1, 10_000),
                device=any_of("cpu", "cuda"),
                loading=Loading(
                    any_of("host", "resident"),
                    any_of(0, 1, 4),
                    any_of(0.0, 1e-9, 1.0),
                    any_of(0.0, 1.0),
                    any_of(1, 2, 100),
                    any_of((), ("resident",), ("cache",)),
                    any_of(0, GIB),
                    any_of(0, GIB),
                    any_of(0, GIB),
                    any_of((), tuple((0.0, i * 20 * MIB) for i in range(8))),
                ),
                batch=any_of(Batch(), ACCUMULATING),
                host=Host(1, any_of(1, 2), any_of(0.0, 1e-5), any_of(0, 1000), any_of(True, False), any_of(None, 0)),
                memory=Memory(any_of(0, MIB), 0, any_of(0, GIB), any_of("none", "full"), any_of(None, 0.0, 1.0)),
                exchange=Exchange(
                    num_ranks,
                    1,
                    any_of("ddp", "fsdp"),
                    any_of(0.0, 0.3, 1.0),
                    any_of(0, GIB),
                    straggler=any_of(None, Straggler(0, 0.0, 0.0, 1.0)),
                    data_wait=any_of((), (1.0,) * num_ranks),
                ),
                pauses=Pauses(
                    any_of(1, 1000),
                    any_of("steps", "epochs", "minutes"),
                    any_of(True, False),
                    num_saves=any_of(0, 1, 100),
                    num_due=any_of(0, 1),
                    write_seconds=any_of(0.0, 100.0),
                    copy_seconds=any_of(None, 0.0, 100.0),
                    num_evaluations=any_of(0, 1),
                ),
            )
        )
        for said_here in found:
            heard_rules.add(said_here.rule)
            assert not re.search(r"\b(nan|inf)\b", said_here.text), said_here
            assert math.isfinite(said_here.rank), said_here
    assert len(heard_rules) == len(RULES)


def test_short_stretches_say_nothing() -> None:
    slow = measured({"data_wait": 0.5}, loading=Loading(num_workers=1, seconds=0.1, cpu_seconds=0.1))
    assert advice(slow) != []
    assert advice(replace(slow, num_steps=7)) == []
    assert advice(replace(slow, seconds=0.9)) == []


def test_the_most_useful_comes_first_and_three_are_enough() -> None:
    shares = {"evaluation": 0.25, "checkpoint": 0.1, "data_wait": 0.15, "communication": 0.15}
    found = advice(
        measured(
            shares,
            pauses=Pauses(is_async=False, num_saves=5, num_due=5, num_evaluations=5),
            exchange=replace(EXCHANGE, share=0.15),
            loading=Loading(num_workers=1, seconds=0.085, cpu_seconds=0.085),
        )
    )
    assert len(found) == 3
    gains = [a.gain or 0.0 for a in found]
    assert gains == sorted(gains, reverse=True)


def test_no_setting_is_changed_twice() -> None:
    """Idle memory and a slow host ask for the same larger micro-batch."""
    found = advice(
        measured(
            batch=ACCUMULATING,
            host=Host(num_cores=16, is_behind=True),
            memory=Memory(peak=2 * GIB, fixed=GIB, target=72 * GIB),
        )
    )
    assert [a.rule for a in found] == ["host_bound"]


def test_each_is_said_once_and_not_of_a_hiccup() -> None:
    adviser = Adviser()
    slow = measured({"data_wait": 0.5}, loading=Loading(num_workers=1, seconds=0.1, cpu_seconds=0.1))
    assert adviser.ask(slow) == []
    assert adviser.ask(measured()) == []
    assert adviser.ask(slow) == []
    assert [a.rule for a in adviser.ask(slow)] == ["data_wait"]
    assert adviser.ask(slow) == []


def test_records_are_what_the_summary_holds() -> None:
    found = heard("data_wait", {"data_wait": 0.31}, loading=Loading(num_workers=4, seconds=0.4, cpu_seconds=0.4))
    record = found.record()
    assert record == {"rule": "data_wait", "text": found.text, "settings": {"data.workers": 8}, "gain": 0.449}


def test_every_rule_is_tested() -> None:
    names = {rule.__name__ for rule in RULES}
    text = "".join(file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("test_advice_on_*.py"))
    assert all(f'"{name}"' in text for name in names)
