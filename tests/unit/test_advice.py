"""What each rule says of given figures, and from where on. That it is true is shown by runs, in test_advice_runs.py."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from trainer.advice.adviser import RULES, Adviser, advice
from trainer.advice.measured import (
    Advice,
    Batch,
    Exchange,
    Host,
    Loading,
    Measured,
    Memory,
    Pauses,
    speed_up,
)
from trainer.advice.stretches import Stragglers, WorkerMemory
from trainer.advice.survey import is_behind
from trainer.faults.pace import Straggler

GIB = 2**30
MIB = 2**20


def measured(shares: dict[str, float] | None = None, **changes: Any) -> Measured:
    """A healthy run on a GPU, in 100 steps of 0.1 s, with other shares of the time and other facts."""
    others = shares or {}
    left = 1 - sum(others.values())
    healthy = Measured(
        seconds=10.0,
        num_steps=100,
        steps_per_epoch=1000,
        total_steps=100_000,
        shares={"forward": left / 3, "backward": left * 2 / 3, **others},
        device="cuda",
        loading=Loading(num_workers=4, seconds=0.1, cpu_seconds=0.1),
        batch=Batch(64, 64, 1, (1, 2, 4, 8, 16, 32, 64)),
        host=Host(num_cores=16),
        memory=Memory(peak=60 * GIB, fixed=10 * GIB, target=72 * GIB, num_blocks=12),
    )
    return replace(healthy, **changes)


def said(rule: str, shares: dict[str, float] | None = None, **changes: Any) -> Advice | None:
    return next((a for a in advice(measured(shares, **changes)) if a.rule == rule), None)


def heard(rule: str, shares: dict[str, float] | None = None, **changes: Any) -> Advice:
    found = said(rule, shares, **changes)
    assert found is not None
    return found


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


# ---- loading -------------------------------------------------------------------------------------------------


def test_workers() -> None:
    # 64 samples in 0.1 s, of which 0.031 s are waited: a worker loads for 0.4 s, and 4 deliver 640 samples/s.
    found = heard("data_wait", {"data_wait": 0.31}, loading=Loading(num_workers=4, seconds=0.4, cpu_seconds=0.4))
    assert found.text == (
        "The device waited 31% of the time for data. 4 workers deliver 640 samples/s, the model can take "
        "928 samples/s: set data.workers=8 (11 cores are free)"
    )
    assert found.settings == {"data.workers": 8}
    assert found.gain == pytest.approx(0.1 / 0.069 - 1)


def test_workers_that_wait_for_a_disk_need_no_cores() -> None:
    loading = Loading(num_workers=1, seconds=0.3, cpu_seconds=0.003)
    found = heard("data_wait", {"data_wait": 0.6}, loading=loading, host=Host(num_cores=2))
    assert found.settings == {"data.workers": 10}
    assert found.text.endswith("(a worker waits 98% of the time, and all need 0.2 of a core)")


def test_cores_limit_the_gain_of_workers() -> None:
    """A step of 50 ms and 60 ms of loading: beside one thread of two cores, or with every core taken by the step."""
    loading = Loading(num_workers=0, seconds=0.06, cpu_seconds=0.06)
    one = heard("data_wait", {"data_wait": 0.6}, loading=loading, host=Host(num_cores=2, num_threads=1), device="cpu")
    assert one.settings == {"data.workers": 2}
    assert one.gain == pytest.approx(0.1 / 0.06 - 1)
    assert "Loading in the thread of the step leaves 640 samples/s" in one.text
    both = heard("data_wait", {"data_wait": 0.6}, loading=loading, host=Host(num_cores=2, num_threads=2), device="cpu")
    assert both.settings == {}
    assert both.gain is None
    assert "and no core of 2 is left for more workers: make reading a sample cheaper" in both.text


@pytest.mark.parametrize(
    ("alternatives", "settings"),
    [
        (("resident", "device_decode", "cache"), {"data.feed": "resident"}),
        (("device_decode", "cache"), {"data.feed": "device_decode"}),
        (("cache",), {"data.cache.path": "cache"}),
        ((), {}),
    ],
)
def test_cheaper_loading_where_no_core_is_left(alternatives: tuple[str, ...], settings: dict[str, str]) -> None:
    loading = Loading(num_workers=3, seconds=0.3, cpu_seconds=0.3, alternatives=alternatives, resident_bytes=4 * GIB)
    found = heard("data_wait", {"data_wait": 0.15}, loading=loading, host=Host(num_cores=4))
    assert found.settings == settings
    assert found.gain is None
    assert "no core of 4 is left for more workers" in found.text
    assert found.text.endswith("at most 18% are to be gained.")


def test_data_lives_on_the_device_where_steps_leave_room() -> None:
    """Of 72 GiB a step takes 60."""
    loading = Loading(num_workers=2, seconds=0.01, alternatives=("resident",), resident_bytes=10 * GIB)
    found = heard("copies", {"h2d": 0.2}, loading=loading)
    assert found.settings == {"data.feed": "resident"}
    assert "10.00 GiB of 12.00 GiB that steps leave free" in found.text
    assert found.gain == pytest.approx(0.25)
    assert heard("copies", {"h2d": 0.2}, loading=replace(loading, resident_bytes=11 * GIB)).settings == {}
    slow = replace(loading, seconds=0.3, cpu_seconds=0.3, resident_bytes=11 * GIB)
    assert heard("data_wait", {"data_wait": 0.15}, loading=slow, host=Host(num_cores=3)).settings == {}


def test_workers_need_memory() -> None:
    """One takes 1 GiB and has two batches of 128 MiB ready or in work: 6 GiB that are free hold 3 more, with care."""
    loading = Loading(num_workers=4, seconds=0.4, cpu_seconds=0.1, batch_bytes=128 * MIB, bytes_per_worker=GIB)
    host = Host(num_cores=64, free_memory=6 * GIB)
    found = heard("data_wait", {"data_wait": 0.6}, loading=loading, host=host)
    assert found.settings == {"data.workers": 7}
    assert found.gain == pytest.approx(0.1 / (0.4 / 7) - 1)
    found = heard("data_wait", {"data_wait": 0.6}, loading=loading, host=replace(host, free_memory=GIB))
    assert found.settings == {}
    assert "the host has no memory for more workers" in found.text
    found = heard("data_wait", {"data_wait": 0.6}, loading=replace(loading, num_workers=64, seconds=6.4))
    assert "64 workers are many" in found.text


def test_a_deeper_queue() -> None:
    loading = Loading(num_workers=4, seconds=0.1, cpu_seconds=0.1, prefetch_factor=2, batch_bytes=MIB)
    found = heard("data_wait", {"data_wait": 0.2}, loading=loading)
    assert found.settings == {"data.prefetch_factor": 8}
    assert found.gain is None
    assert "at most 25%" in found.text
    assert "They take up to 32.00 MiB of pinned host memory." in found.text
    deep = replace(loading, prefetch_factor=8)
    assert heard("data_wait", {"data_wait": 0.2}, loading=deep).settings == {"data.prefetch_factor": 16}
    assert said("data_wait", {"data_wait": 0.2}, loading=replace(loading, prefetch_factor=16)) is None
    assert said("data_wait", {"data_wait": 0.2}, loading=loading, host=Host(16, free_memory=20 * MIB)) is None


def test_copies() -> None:
    loading = Loading(num_workers=0, seconds=0.01, cpu_seconds=0.01)
    found = heard("copies", {"h2d": 0.2, "data_wait": 0.1}, loading=loading)
    assert found.settings == {"data.workers": 1}
    assert found.gain == pytest.approx(0.1 / 0.07 - 1)
    found = heard("copies", {"h2d": 0.2}, loading=replace(loading, num_workers=2, alternatives=("resident",)))
    assert found.settings == {"data.feed": "resident"}
    assert found.gain == pytest.approx(0.25)
    found = heard("copies", {"h2d": 0.2}, loading=replace(loading, num_workers=2))
    assert found.settings == {}
    assert found.gain is None


def test_memory_of_workers() -> None:
    """Of 4 workers each grows by 25 MiB in a minute; a run of 10,000 s takes 17 GiB in the end."""

    def loading(series: Iterable[tuple[float, int]]) -> Loading:
        return Loading(num_workers=4, seconds=0.1, worker_bytes=tuple(series))

    grows = tuple((60.0 * i, (GIB + i * 100 * MIB) // 4) for i in range(7))
    roomy = Host(num_cores=16, free_memory=20 * GIB)
    found = heard("loader_memory", loading=loading(grows), host=roomy)
    assert found.text.startswith("Loader workers grew from 1.00 GiB to 1.59 GiB in 6 min, 5.86 GiB an hour.")
    assert (found.settings, found.gain) == ({}, None)
    full = heard("loader_memory", loading=loading(grows), host=replace(roomy, free_memory=10 * GIB))
    assert "fills the memory" in full.text
    assert full.rank > 1 > 0.02 > found.rank
    for stays in (
        grows[:5],  # too few to tell
        (*grows, (420.0, grows[-1][1])),  # it has come to an end
        ((60.0 * i, (GIB + i * MIB) // 4) for i in range(7)),  # hardly
        (*grows, *((60.0 * i, grows[-1][1] + 1024 * i) for i in range(7, 13))),  # hardly any more
    ):
        assert said("loader_memory", loading=loading(stays), host=roomy) is None


def test_memory_is_compared_with_that_of_as_many_settled_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("trainer.advice.stretches.time.monotonic", lambda: now)
    memory = WorkerMemory()
    for at, num_workers, size in (
        (1.0, 2, 10),  # just started
        (50.0, 2, 20),
        (61.0, 2, 30),
        (70.0, 2, None),
        (80.0, 2, 40),
    ):
        now = at
        memory.add(num_workers, size)
    assert memory.series == [(61.0, 30), (80.0, 40)]
    now = 90.0
    memory.add(3, 50)
    assert (memory.series, memory.latest) == ([], 50)


# ---- computing -----------------------------------------------------------------------------------------------

ACCUMULATING = Batch(64, 8, 8, (1, 2, 4, 8, 16, 32, 64), has_batchnorm=True)


def test_tiny_kernels_on_a_gpu() -> None:
    host = Host(num_cores=16, is_behind=True)
    memory = Memory(peak=2 * GIB, fixed=GIB, target=72 * GIB)
    found = heard("host_bound", batch=ACCUMULATING, host=host, memory=memory)
    assert found.settings == {"train.micro_batch_size": 64}
    assert found.gain is None
    assert "BatchNorm" in found.text
    assert "is not known here" in found.text
    found = heard("host_bound", host=host)
    assert found.settings == {"model.compile": "blocks"}
    assert found.gain is None
    assert said("host_bound", host=host, compiles=True) is None


def test_pauses_do_not_tell_of_a_slow_host() -> None:
    assert is_behind(num_steps=100, num_idle=95.0, num_after_pauses=10)
    assert not is_behind(num_steps=100, num_idle=80.0, num_after_pauses=10)
    assert not is_behind(num_steps=100, num_idle=10.0, num_after_pauses=10)
    assert not is_behind(num_steps=100, num_idle=100.0, num_after_pauses=100)  # a report after each step
    assert not is_behind(num_steps=0, num_idle=0.0, num_after_pauses=0)


def test_tiny_kernels_on_a_cpu() -> None:
    host = Host(num_cores=2, operation_seconds=10e-6, num_operations=1000)
    memory = Memory(peak=2 * GIB, fixed=GIB, target=20 * GIB)
    found = heard("host_bound", batch=ACCUMULATING, host=host, memory=memory, device="cpu")
    assert "1,000 small operations" in found.text
    assert found.settings == {"train.micro_batch_size": 64}
    assert found.gain == pytest.approx(speed_up(0.8 * 7 / 8))
    few = replace(host, num_operations=300)
    assert said("host_bound", batch=ACCUMULATING, host=few, memory=memory, device="cpu") is None


def test_a_micro_batch_must_fit() -> None:
    host = Host(num_cores=2, operation_seconds=10e-6, num_operations=1000)
    memory = Memory(peak=2 * GIB, fixed=GIB, target=6 * GIB)
    found = heard("host_bound", batch=ACCUMULATING, host=host, memory=memory, device="cpu")
    assert found.settings == {"train.micro_batch_size": 32}


def test_idle_memory() -> None:
    memory = Memory(peak=10 * GIB, fixed=6 * GIB, target=72 * GIB)
    found = heard("micro_batch", batch=ACCUMULATING, memory=memory)
    assert found.settings == {"train.micro_batch_size": 64}
    assert found.gain is None
    assert said("micro_batch", batch=ACCUMULATING, memory=replace(memory, peak=40 * GIB)) is None
    assert said("micro_batch", memory=memory) is None  # the batch is whole
    exchange = Exchange(num_ranks=8, strategy="fsdp", share=0.3, gradient_bytes=GIB, parameter_bytes=70 * GIB)
    found = heard("micro_batch", batch=ACCUMULATING, memory=memory, exchange=exchange)
    assert found.gain == pytest.approx(speed_up(0.3 * (1 - 3 / 17)))  # parameters travel twice per micro-batch


def test_needless_recomputation() -> None:
    memory = Memory(peak=10 * GIB, fixed=6 * GIB, target=72 * GIB, checkpointing="full", recomputed=1.0, num_blocks=12)
    found = heard("recomputation", memory=memory)
    assert found.settings == {"memory.checkpointing": "none"}
    assert found.gain == pytest.approx(speed_up(1 / 3))
    found = heard("recomputation", memory=replace(memory, num_blocks=48))  # without it, they may not fit
    assert found.settings == {"memory.checkpointing": "auto"}
    assert found.gain is None
    assert said("recomputation", memory=replace(memory, num_blocks=48, checkpointing="auto")) is None
    assert said("recomputation", memory=replace(memory, num_blocks=48, is_planned=False)) is None
    found = heard("recomputation", memory=replace(memory, checkpointing="selective", recomputed=None))
    assert found.gain is None
    assert said("recomputation", memory=replace(memory, peak=40 * GIB)) is None


# ---- ranks ---------------------------------------------------------------------------------------------------

EXCHANGE = Exchange(num_ranks=8, num_nodes=2, share=0.3, gradient_bytes=100 * MIB, hosts=("a",) * 4 + ("b",) * 4)


def test_compression() -> None:
    found = heard("communication", {"communication": 0.3}, exchange=EXCHANGE)
    assert found.settings == {"parallel.gradient_compression": "bf16"}
    assert found.gain == pytest.approx(speed_up(0.15))
    compressed = replace(EXCHANGE, compression="bf16")
    found = heard("communication", {"communication": 0.3}, exchange=compressed)
    assert found.settings == {}
    assert "changes the optimisation" in found.text
    assert said("communication", {"communication": 0.3}, exchange=replace(EXCHANGE, share=0.05)) is None


def test_one_bucket() -> None:
    exchange = replace(EXCHANGE, gradient_bytes=16 * MIB)
    found = heard("communication", {"communication": 0.3}, exchange=exchange)
    assert found.settings == {"parallel.bucket_mb": 2}
    # An eighth is left when backward is over.
    assert found.gain == pytest.approx(speed_up(0.3 * 7 / 8))


def test_sharded_models() -> None:
    sharded = replace(EXCHANGE, strategy="fsdp", parameter_bytes=GIB)
    found = heard("communication", {"communication": 0.3}, exchange=sharded)
    assert found.settings == {"parallel.reshard_after_forward": False}
    assert found.gain == pytest.approx(speed_up(0.1))
    found = heard("communication", {"communication": 0.3}, exchange=replace(sharded, parameter_bytes=30 * GIB))
    assert found.settings == {"parallel.strategy": "hsdp"}
    assert found.gain is None
    found = heard(
        "communication", {"communication": 0.3}, exchange=replace(sharded, num_nodes=1, parameter_bytes=30 * GIB)
    )
    assert found.settings == {}


def test_straggler() -> None:
    slow = replace(EXCHANGE, share=0.05, straggler=Straggler(5, 0.08, 0.06, 0.2), data_wait=(0.0,) * 8)
    found = heard("straggler", {"communication": 0.2}, exchange=slow)
    assert found.text == (
        "Rank 5 on b takes 80 ms to the exchange of gradients, the others 60 ms: all wait for it, 20% of the time. "
        "`python -m launch doctor` compares the machines."
    )
    assert (found.settings, found.gain) == ({}, pytest.approx(0.25))
    waits = (*(0.0,) * 5, 0.2, 0.0, 0.0)
    found = heard("straggler", {"communication": 0.2}, exchange=replace(slow, data_wait=waits))
    assert "It waits for its data 20% of the time: look at its disk" in found.text


def test_a_straggler_of_a_whole_run_is_one_that_cost_much_of_it() -> None:
    stragglers = Stragglers()
    stragglers.add(Straggler(1, 0.9, 0.1, 0.5), 10)
    stragglers.add(None, 990)
    assert stragglers.worst() is None
    stragglers.add(Straggler(2, 0.3, 0.1, 0.4), 500)
    stragglers.add(Straggler(2, 0.5, 0.1, 0.4), 500)
    found = stragglers.worst()
    assert found is not None
    assert (found.rank, found.seconds, found.share) == (2, pytest.approx(0.4), pytest.approx(0.2))
    assert Stragglers().worst() is None


# ---- pauses --------------------------------------------------------------------------------------------------


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


# ---- when and in which order ---------------------------------------------------------------------------------


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


def test_every_rule_is_tested_here() -> None:
    names = {rule.__name__ for rule in RULES}
    with open(__file__, encoding="utf-8") as file:
        text = file.read()
    assert all(f'"{name}"' in text for name in names)
