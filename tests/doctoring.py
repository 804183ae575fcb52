"""Readings of ranks that are not there, for tests of what the doctor makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from launch.doctor.meeting import Meeting
from launch.doctor.situation import Situation
from launch.doctor.verdicts import Judgement, Place, Reading
from trainer.config import Config

Judge = Callable[[Sequence[Reading]], Judgement]
CPU = torch.device("cpu")


def place(rank: int, ranks_per_host: int = 1, device: str = "cpu") -> Place:
    node = rank // ranks_per_host
    return Place(rank, node, f"host{node + 1}", device, is_first=rank % ranks_per_host == 0)


def readings(values: Sequence[dict[str, Any]], **common: Any) -> list[Reading]:
    return [Reading(place(rank), {**common, **own}) for rank, own in enumerate(values)]


def situation(config: Config | None = None, patience: float = 20.0) -> Situation:
    return Situation(place(0), [place(0)], 1, CPU, config, Meeting(0, 1, patience), patience)


def said(judgement: Judgement) -> list[tuple[str, str]]:
    return [(finding.verdict.value, finding.message) for finding in judgement.findings]
