"""`python -m trainer sync`: sends W&B's server what it lacks of a run, after the run.

`metrics.jsonl` and `summary.json` say what there is, and the server how far it has got: whatever happened to networks
and processes before, the result is one curve. Pictures of evaluations are not sent.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from accelerate import PartialState

from trainer.config import load_config
from trainer.errors import UserError, one_line_text
from trainer.files import read_summary
from trainer.report.curves import records
from trainer.tracking.wandb_run import WandbRun, answers, end_service, has_wandb_key, known_id, wandb_server

logger = logging.getLogger("lockstep")

_PATIENCE = "24 hours"  # for uploads: somebody is looking on
_PATIENCE_SECONDS = 24 * 3600.0
# This process is not the run's: what it does and where is nobody's business.
_SETTINGS = {"silent": True, "console": "off", "x_disable_stats": True, "x_disable_meta": True}


def sync(run_dir: Path) -> bool:
    """Sends what is missing: the history, checkpoints that wait for their upload, the summary and how the run ended.

    The run must not be going on meanwhile.

    Args:
        run_dir: the run folder.

    Returns:
        Whether the server has all now.

    Raises:
        UserError: the folder has no W&B run, there is no API key, or the server does not answer.
    """
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"'{run_dir}' is no run folder: it has no config.yaml")
    wandb_id = known_id(run_dir)
    if wandb_id is None:
        raise UserError(f"the run in '{run_dir}' has no W&B run: tracking.trackers had no wandb")
    changes = ["tracking.wandb.mode=online", f"tracking.wandb.finish_timeout={_PATIENCE}", "checkpoint.resume=auto"]
    config = load_config(str(run_dir / "config.yaml"), changes)
    os.environ.setdefault("WANDB_SILENT", "true")  # before its first import: our own lines are enough
    host = urlsplit(wandb_server()).hostname
    if not has_wandb_key():
        raise UserError(f"no API key for {host}: type `wandb login`, or set WANDB_API_KEY")
    if not answers(wandb_server()):
        raise UserError(f"{host} cannot be reached")
    arguments = dict(config.tracking.init.get("wandb", {}))
    arguments["settings"] = {**arguments.get("settings", {}), **_SETTINGS}
    found = [record for record in records(run_dir / "metrics.jsonl") if isinstance(record.get("step"), int)]
    goals = {"train/loss": "min", "eval/loss": "min"}
    PartialState(cpu=True)
    try:
        run = WandbRun(config, run_dir, wandb_id, found, goals, arguments, must_be_online=True)
    except Exception as error:  # a key that the server refuses, a run that was deleted there, ...
        raise UserError(f"{host} does not take the run: {one_line_text(error)}") from error
    summary = read_summary(run_dir)
    run.summarise(_told(summary), 0)
    try:
        run.finish(summary.get("status", "failed") == "failed", None, _PATIENCE_SECONDS)
    except KeyboardInterrupt:
        end_service()
        raise
    if run.is_complete:
        logger.info("sent %d rows to the W&B run %s, which has all now", run.num_sent, run.id)
    return run.is_complete


def _told(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what of a summary a run tells W&B at its end."""
    told = {key: summary[key] for key in ("goodput", "status") if summary.get(key) is not None}
    advice = [said["text"] for said in summary.get("advice") or []]
    if advice:
        told["advice"] = "\n".join(advice)
    best = summary.get("best")
    if best is not None:
        told |= {f"best/eval/{best['metric']}": best["value"], "best/step": best["step"]}
    return told
