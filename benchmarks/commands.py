"""What the command lines of the benchmarks have in common: where the result goes, the device, rounds, checks only."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def new_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser with `--json` and `--markdown`; its description is the first line of the module's docstring."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=(doc or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the result goes")
    parser.add_argument("--markdown", action="store_true", help="measure nothing: print the table of --json")
    return parser


def add_device(parser: argparse.ArgumentParser, default: str = "cpu") -> None:
    """Adds `--device`."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default, help=f"default: {default}")


def add_rounds(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Adds `--rounds`, `--seed` of their order, and `--keep-loaded`."""
    parser.add_argument("--rounds", type=_positive, default=rounds, metavar="N", help=f"default: {rounds}")
    parser.add_argument("--seed", type=int, default=0, help="of the order in a round and of what is random in entries")
    parser.add_argument("--keep-loaded", action="store_true", help="keep rounds in which others used the machine too")


def add_tiny(parser: argparse.ArgumentParser) -> None:
    """Adds `--tiny`."""
    parser.add_argument("--tiny", action="store_true", help="a check that all parts run: measures nothing of interest")


def is_ready(device_type: str) -> bool:
    """Returns whether the device is there, and says so where it is not; on a CPU no GPU is seen from now on."""
    import torch

    if device_type == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        sys.stderr.write("there is no CUDA GPU here; use --device cpu\n")
        return False
    return True


def show_again(file: Path, table: Callable[[Mapping[str, Any]], str]) -> int:
    """Prints the table of a result that is there; returns the exit code 0."""
    sys.stdout.write(table(json.loads(file.read_text(encoding="utf-8"))))
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
