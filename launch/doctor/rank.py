"""What every rank of the doctor runs, whoever started it: torchrun, `accelerate launch`, or nobody else.

It makes all checks and hands in what it has found; rank 0 shows it. Whatever stalls is left behind after a while, so
the process ends without waiting for its threads.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # not this folder, whose modules have common names

import torch
from torch.distributed import DistError

from launch.doctor.agreed import FOLDER_VARIABLE, is_bare, verdict_file
from launch.doctor.checks import CHECKS
from launch.doctor.meeting import Meeting
from launch.doctor.report import Line, Report, judge, judge_ranks
from launch.doctor.situation import Check, Situation, take
from launch.doctor.verdicts import Place, Reading, Verdict
from trainer.cli import EXIT_FAILED, EXIT_FINISHED, add_config_arguments
from trainer.config import load_config
from trainer.errors import one_line_text
from trainer.system import die_with_parent

_MARGIN = 0.5  # of what one check may take: what a rank gets beyond that, before the others give it up


def main(arguments: Sequence[str] | None = None, checks: Sequence[Check] = CHECKS) -> int:
    """Makes the checks on this rank and returns the exit code of the process; the verdict is in a file."""
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--timeout", type=float, required=True)
    options = parser.parse_intermixed_args(arguments)
    if sys.platform == "linux":
        die_with_parent()
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        meeting = Meeting(rank, num_ranks, (1 + _MARGIN) * options.timeout)
        return _check_all(meeting, options, checks)
    except (DistError, OSError) as error:  # the store went, and rank 0 with it
        sys.stderr.write(f"rank {rank} on {socket.gethostname()}: rank 0 cannot be reached: {one_line_text(error)}\n")
        return EXIT_FAILED


def _check_all(meeting: Meeting, options: argparse.Namespace, checks: Sequence[Check]) -> int:
    started = time.time()
    meeting.at("start")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    node = int(os.environ.get("GROUP_RANK", "0"))
    place = Place(meeting.rank, node, socket.gethostname(), str(device), is_first=local_rank == 0)
    places = {rank: Place(**values) for rank, values in meeting.collect("place", asdict(place)).items()}
    situation = Situation(
        place=place,
        places=list(places.values()),
        num_local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        device=device,
        config=None if is_bare(options.config) else load_config(options.config, options.overrides),
        meeting=meeting,
        patience=options.timeout,
    )
    for check in checks:
        situation.now(check.name)
        if check.is_together:
            meeting.gather(f"before {check.name}")  # also those that have nothing to measure
        if check.concerns(place):
            meeting.put(f"values of {check.name}", take(check, situation))  # at once: it may be the last
    situation.now("handing in")
    meeting.gather("end")
    code = None
    if meeting.rank == 0:
        facts = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
            "seconds": round(time.time() - started, 1),
            "config": None if situation.config is None else options.config,
            "overrides": options.overrides,
            "num_ranks": meeting.num_ranks,
        }
        report = Report(list(places.values()), facts)
        report.lines.append(Line("ranks", judge_ranks(meeting.num_ranks, places, meeting.missing, meeting.patience)))
        for check in checks:
            found = meeting.found(f"values of {check.name}")
            readings = tuple(Reading(places[rank], values) for rank, values in found.items() if rank in places)
            report.lines.append(Line(check.name, judge(check, readings), readings))
        code = EXIT_FAILED if report.verdict == Verdict.FAIL else EXIT_FINISHED
        _show(report, options.json)
        if folder := os.environ.get(FOLDER_VARIABLE):
            verdict_file(Path(folder)).write_text(str(code))
    code = meeting.from_main("verdict", code)
    situation.clean()
    meeting.leave()
    # With the exit code of a failure the agent ends those that did not come to the end.
    return EXIT_FAILED if meeting.missing or code is None else EXIT_FINISHED


def _show(report: Report, file: Path) -> None:
    text, errors = report.table(), report.errors()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(report.to_json())
        text += f"all numbers of all ranks: {file}\n"
    except OSError as error:
        sys.stderr.write(f"no JSON: '{file}': {error.strerror or one_line_text(error)}\n")
    sys.stdout.write(text)
    sys.stdout.flush()
    sys.stderr.write("".join(f"{line}\n" for line in errors))
    sys.stderr.flush()


def run_and_leave(**options: Any) -> NoReturn:
    """Runs `main` and ends the process, whatever its threads still wait for."""
    try:
        code = main(**options)
    except Exception:
        traceback.print_exc()
        code = EXIT_FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run_and_leave()
