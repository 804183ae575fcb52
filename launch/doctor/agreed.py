"""What the doctor's ranks and whoever starts them have agreed on. Imports no torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from trainer.config import Config

BARE = Path(__file__).with_name("bare.yaml").resolve()  # stands in for a config where none is given
RANK_SCRIPT = str(Path(__file__).with_name("rank.py").resolve())
FOLDER_VARIABLE = "LOCKSTEP_DOCTOR_FOLDER"  # where rank 0 leaves the verdict for whoever started it
_TIMEOUT = 60.0


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line.

    Args:
        file: the config file, or its stand-in.
        overrides: of it.
        config: what these come to.
        timeout: seconds for one check, and for a rank to come.
        json: file for the report; None for the default.
    """

    file: str
    overrides: tuple[str, ...]
    config: Config
    timeout: float
    json: Path | None

    @property
    def options(self) -> list[str]:
        """The options of the ranks' script, and of the agents that start it."""
        default = Path("doctor.json") if is_bare(self.file) else self.config.run_dir / "doctor.json"
        return ["--json", str(self.json or default), "--timeout", f"{self.timeout:g}"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that are handed on from the command line to the ranks."""
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="for all numbers (default: doctor.json in the run folder, or here)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=_TIMEOUT,
        metavar="SECONDS",
        help=f"for one check, and for a rank to come (default: {_TIMEOUT:.0f})",
    )


def is_bare(file: str) -> bool:
    """Tells whether a config is the stand-in."""
    return Path(file).resolve() == BARE


def verdict_file(folder: Path) -> Path:
    """Returns where rank 0 leaves the exit code, for an agent on its machine."""
    return folder / "verdict"
