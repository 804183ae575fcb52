"""What the rules of computing and of ranks say of given figures. Runs show that it is true: test_advice_runs.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
from healthy_run import ACCUMULATING, EXCHANGE, GIB, MIB, heard, said

from trainer.advice.measured import Exchange, Host, Memory, speed_up
from trainer.advice.stretches import Stragglers
from trainer.advice.survey import is_behind
from trainer.faults.pace import Straggler

# ---- computing -----------------------------------------------------------------------------------------------


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
