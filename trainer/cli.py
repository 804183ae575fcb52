"""The command lines: `train.py` and `python -m trainer`. Owns arguments, exit codes and how errors are shown.

torch is imported only once the config is known to be good, so that `--help` and config errors answer at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from trainer.config import Config, load_config, read_section, schema_text
from trainer.config_data import CacheConfig
from trainer.errors import UserError, one_line, one_line_text
from trainer.faults.fault import is_lost_peer
from trainer.faults.stopping import STOP_SIGNALS
from trainer.imports import without_collector
from trainer.memory.out_of_memory import handle_out_of_memory, is_out_of_memory
from trainer.system import LAUNCHER_VARIABLE

if TYPE_CHECKING:
    from trainer.loop import Trainer

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75

_EXIT_CODES = "exit codes: 0 finished, 2 bad config or usage, 75 stopped early on request (start me again), 1 else"


def train(arguments: Sequence[str] | None = None) -> int:
    """`train.py`: trains what a config file describes. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train the model that a YAML file describes, on one process or many.",
        epilog=f"Under `accelerate launch`, `torchrun` or plain `python`. {_EXIT_CODES}.",
    )
    add_config_arguments(parser)
    parser.add_argument("--print-config", action="store_true", help="print the resolved config as YAML and exit")
    options = parser.parse_intermixed_args(arguments)
    return run_command(lambda: _train(options))


def add_config_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Adds `--config FILE [section.key=value ...]`, the same for every command that reads a config.

    Args:
        parser: of the command.
        default: file where none is given; None where one must be.
    """
    parser.add_argument(
        "--config", required=default is None, default=default, metavar="FILE", help="YAML file of the run"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m trainer`: what can be done with a run's results. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer", epilog=f"{_EXIT_CODES}.")
    commands = parser.add_subparsers(dest="command", required=True)
    evaluate = commands.add_parser("evaluate", help="evaluate a run's checkpoint and print its metrics as JSON")
    export = commands.add_parser("export", help="write a run's weights, or its model, to one file")
    for command in (evaluate, export):
        command.add_argument("run_dir", metavar="RUN_DIR", help="run folder, such as runs/digits")
        command.add_argument("--best", action="store_true", help="the best checkpoint instead of the newest")
        kinds = "averages (optim.ema) or the last weights (default: averages where there are any)"
        command.add_argument("--weights", choices=("ema", "raw"), help=kinds)
    formats = ("safetensors", "state_dict", "onnx", "torch_export")
    what = "the weights, or (onnx, torch_export) the model, whose inputs are already cropped and normalised"
    export.add_argument("--format", choices=formats, default="safetensors", help=f"{what} (default: safetensors)")
    export.add_argument("--output", required=True, metavar="FILE", help="file to write")
    export.add_argument("--artifact", action="store_true", help="also add the file to the run's W&B run")
    report = commands.add_parser("report", help="write a run's page, or one that compares runs, as one HTML file")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run folder, such as runs/digits")
    default = "default: report.html in the run folder, or here where there are several runs"
    report.add_argument("--output", metavar="FILE", help=f"file to write ({default})")
    pack = commands.add_parser("pack", help="pack an image folder into few large files, for data.cache")
    pack.add_argument("source", metavar="SRC", help="folder of class folders")
    pack.add_argument("path", metavar="DST", help="what data.cache.path will be; its folder of this pack is printed")
    pack.add_argument("--max-size", type=int, default=400, help="shorter side in pixels, 0 keeps all (default: 400)")
    pack.add_argument("--encoding", choices=("jpeg", "raw", "mixed"), default="jpeg")
    pack.add_argument("--quality", type=int, default=90, help="of JPEGs (default: 90)")
    pack.add_argument("--workers", type=int, help="processes (default: one per core)")
    pack.add_argument("--on-error", choices=("raise", "skip"), default="raise", help="what a broken picture does")
    pack.add_argument("--verify", action="store_true", help="read everything back and compare checksums")
    profile = commands.add_parser("profile", help="summarise the profiles of a run's ranks (profile.steps)")
    profile.add_argument("run_dir", metavar="RUN_DIR", help="run folder, such as runs/digits")
    profile.add_argument("--json", action="store_true", help="print it as JSON")
    sync = commands.add_parser("sync", help="send W&B what it lacks of a run that has ended")
    sync.add_argument("run_dir", metavar="RUN_DIR", help="run folder, such as runs/digits")
    commands.add_parser("schema", help="print the JSON Schema of config files")
    commands.add_parser("reference", help="print the reference of all config keys, docs/config.md")
    options = parser.parse_args(arguments)
    return run_command(lambda: _run_main(options), log_to_stderr=True)  # stdout is the result


def run_command(command: Callable[[], int], log_to_stderr: bool = False) -> int:
    """Runs a command; a UserError becomes one line per problem on stderr and exit code 2."""
    set_up_logging(log_to_stderr)
    # A user's own modules are found from where the command is typed, as under `python -m`.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return command()
    except UserError as error:
        show_problems(error)
        return EXIT_USAGE
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return EXIT_FAILED


def set_up_logging(to_stderr: bool) -> None:
    """Sends our log lines to stdout or stderr, from rank 0 only; warnings of other ranks pass."""
    from tqdm import tqdm

    class BesideProgressBar(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            stream = sys.stderr if to_stderr else sys.stdout
            tqdm.write(self.format(record), file=stream)
            stream.flush()

    logger = logging.getLogger("lockstep")
    logger.handlers = [BesideProgressBar()]
    logger.propagate = False
    logger.setLevel(logging.INFO if _rank() == 0 else logging.WARNING)


def show_problems(error: UserError, config: Config | None = None) -> None:
    """Writes one line per problem to stderr, with file and line where the config knows them."""
    for problem in error.problems:
        sys.stderr.write(f"error: {config.locate(problem) if config else problem}\n")
    sys.stderr.flush()


def leave(code: int) -> NoReturn:
    """Ends the program. A failed rank of several goes at once: tidy shutdown can wait for peers or abort."""
    if code == EXIT_STOPPED:
        # A launcher that sees the first rank go ends the others; they are on their way.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        is_ours = os.environ.get(LAUNCHER_VARIABLE) == str(os.getppid())
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 and not is_ours:
            code = EXIT_FINISHED  # torchrun by itself starts a job again after any other code
    if code in (EXIT_FAILED, EXIT_USAGE) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _train(options: argparse.Namespace) -> int:
    try:
        config = load_config(options.config, options.overrides).of_trial(os.environ)
    except UserError:
        if _rank() == 0:  # every rank reads the same file; one of them says what is wrong with it
            raise
        return EXIT_USAGE
    if options.print_config:
        sys.stdout.write(config.to_yaml())
        return EXIT_FINISHED
    with without_collector():
        from trainer.loop import Trainer

    trainer: Trainer | None = None
    try:
        trainer = Trainer(config)
        status = trainer.fit()
    except UserError as error:
        if trainer is not None:
            trainer.tell(error)
        if _rank() == 0 or not error.agreed:
            show_problems(error, config)
        if trainer is not None:
            trainer.abandon(error)
        return EXIT_USAGE
    except BaseException as error:
        if trainer is not None:
            trainer.tell(error)  # before all that takes time
        _tell_torchrun(error)
        _show_error(error, config, trainer)
        if trainer is not None:
            trainer.abandon(error)
        return EXIT_FAILED
    return EXIT_FINISHED if status == "finished" else EXIT_STOPPED


def _tell_torchrun(error: BaseException) -> None:
    """Writes the error where torchrun looks for it, which then shows that of the rank that failed first, and last."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ and not is_lost_peer(error):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        with suppress(Exception):  # a full disk must not hide the error itself
            get_error_handler().record_exception(error)


def _show_error(error: BaseException, config: Config, trainer: Trainer | None) -> None:
    """Writes to stderr what ended the training, as short as the reader's next step allows."""
    if is_out_of_memory(error):
        handle_out_of_memory(error, config, _rank(), trainer.situation if trainer is not None else None)
    elif is_lost_peer(error):
        if trainer is None or trainer.ended_by() is None:
            sys.stderr.write(f"rank {_rank()}: another rank has ended, and said why: {one_line(error)[:160]}\n")
    elif type(error).__name__ == "WorkerDied":  # it says all; importing it here would import torch
        sys.stderr.write(f"error: rank {_rank()}: {one_line(error)}\n")
    elif type(error).__name__ in ("SaveFailed", "BadNumbers"):  # the same on every rank
        if _rank() == 0:
            sys.stderr.write(f"error: {one_line_text(error)}\n")
    elif isinstance(error, KeyboardInterrupt):
        if trainer is None:
            sys.stderr.write("interrupted before training began\n")
    else:
        traceback.print_exc()


def _pack(options: argparse.Namespace) -> int:
    config = read_section(
        CacheConfig,
        path=options.path,
        max_size=options.max_size or None,
        encoding=options.encoding,
        quality=options.quality,
    )
    with without_collector():
        from trainer.data.datasets import ImageFolder
        from trainer.data.packed import PackedImages
        from trainer.data.packing import pack_folder
        from trainer.data.tuning import cores_of_a_rank

    workers = cores_of_a_rank(1) if options.workers is None else max(options.workers, 0)
    folder = pack_folder(ImageFolder(options.source), config, num_workers=workers, on_error=options.on_error)
    packed = PackedImages(folder, read_ahead=False)
    if options.verify:
        packed.verify()
    sys.stdout.write(f"{folder}\n")
    return EXIT_FINISHED


def _run_main(options: argparse.Namespace) -> int:
    if options.command == "schema":
        sys.stdout.write(schema_text())
        return EXIT_FINISHED
    if options.command == "reference":
        from trainer.reference import reference_text

        sys.stdout.write(reference_text())
        return EXIT_FINISHED
    if options.command == "pack":
        return _pack(options)
    if options.command == "profile":
        from trainer.profiling.summary import summarise, summary_text

        summary = summarise(Path(options.run_dir))
        sys.stdout.write(json.dumps(summary, indent=2) + "\n" if options.json else summary_text(summary))
        return EXIT_FINISHED
    if options.command == "report":
        from trainer.report import write_report

        output = Path(options.output) if options.output is not None else None
        sys.stdout.write(f"{write_report([Path(run) for run in options.runs], output)}\n")
        return EXIT_FINISHED
    if options.command == "sync":
        with without_collector():
            from trainer.tracking.syncing import sync

        return EXIT_FINISHED if sync(Path(options.run_dir)) else EXIT_FAILED
    with without_collector():
        from trainer import results

    run_dir = Path(options.run_dir)
    if options.command == "export":
        results.export(
            run_dir,
            options.format,
            Path(options.output),
            best=options.best,
            kind=options.weights,
            as_artifact=options.artifact,
        )
    else:
        metrics = results.evaluate(run_dir, best=options.best, kind=options.weights)
        sys.stdout.write(json.dumps(metrics) + "\n")
    return EXIT_FINISHED
