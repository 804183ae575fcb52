"""All checks, in the order in which every rank makes them and the report shows them."""

from __future__ import annotations

from launch.doctor import devices, disks, exchange, machine
from launch.doctor.situation import Check
from launch.doctor.verdicts import Verdict

CHECKS = (
    Check("versions", machine.measure_versions, machine.judge_versions),
    Check("devices", devices.measure_devices, devices.judge_devices, on="hosts"),
    Check("variables", machine.measure_variables, machine.judge_variables),
    Check("open files", machine.measure_open_files, machine.judge_open_files, on="hosts"),
    Check("/dev/shm", machine.measure_shared_memory, machine.judge_shared_memory, on="hosts"),
    Check("cores", machine.measure_cores, machine.judge_cores, on="hosts"),
    Check("memory", machine.measure_memory, machine.judge_memory, on="hosts"),
    Check("ports", machine.measure_ports, machine.judge_ports, on="hosts"),
    # Together: a rank that computes while its neighbour does not would look faster than it will be.
    Check("matmul", devices.measure_product, devices.judge_product, is_together=True),
    Check("GPU health", devices.measure_health, devices.judge_health, is_together=True),
    Check("host to GPU", devices.measure_copies, devices.judge_copies, is_together=True),
    Check("connecting", exchange.connect, exchange.judge_connect, is_together=True, is_exchange=True),
    Check("clocks", exchange.measure_clock, exchange.judge_clock, is_together=True, is_exchange=True),
    Check("all-reduce", exchange.measure_all_reduce, exchange.judge_all_reduce, is_together=True, is_exchange=True),
    Check("pairs", exchange.measure_pairs, exchange.judge_pairs, is_together=True, is_exchange=True),
    Check("run folder", disks.measure_sharing, disks.judge_sharing),
    Check("reading data", disks.measure_reading, disks.judge_reading, on="hosts", is_together=True),
    Check("checkpoint", disks.measure_writing, disks.judge_writing, on="hosts", is_together=True),
    Check("W&B", machine.measure_wandb, machine.judge_wandb, on="main", on_problem=Verdict.WARN),
)
