"""Hosts and a Slurm on them, made once for all tests and mended before each."""

from __future__ import annotations

from collections.abc import Iterator

import cluster_machines
import pytest
from cluster_machines import Hosts, Slurm


@pytest.fixture(scope="session")
def machines_slot() -> Iterator[int]:
    with cluster_machines.slot() as slot:
        yield slot


@pytest.fixture(scope="session")
def _hosts(request: pytest.FixtureRequest) -> Hosts:
    if reason := cluster_machines.missing_for_hosts():
        pytest.skip(reason)
    return Hosts(request.getfixturevalue("machines_slot"))


@pytest.fixture(scope="session")
def _slurm(request: pytest.FixtureRequest) -> Slurm:
    if reason := cluster_machines.missing_for_slurm():
        pytest.skip(reason)
    hosts = request.getfixturevalue("_hosts")
    return Slurm(hosts.slot, hosts)


@pytest.fixture
def hosts(_hosts: Hosts) -> Hosts:
    """Three hosts with sshd, on which nothing runs."""
    _hosts.mend()
    return _hosts


@pytest.fixture
def slurm(hosts: Hosts, _slurm: Slurm) -> Slurm:
    """Slurm on the three hosts, without jobs."""
    _slurm.mend()
    return _slurm
