"""What can be done with a run's results: evaluate a checkpoint, export its weights."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import CheckpointFolder
from trainer.config import Config, load_config
from trainer.errors import UserError

logger = logging.getLogger("lockstep")


def evaluate(run_dir: Path, *, best: bool) -> dict[str, float]:
    """Evaluates the newest or best checkpoint of a run on this machine and returns its metrics.

    Raises:
        UserError: there is no such checkpoint, or the run has no evaluation data.
    """
    from trainer.loop import Trainer

    config = _read_config(run_dir)
    train = config.train
    # On this one process, however many trained: no accumulation to fit, the same evaluation batches.
    micro_batch_size = train.micro_batch_size
    if micro_batch_size == "auto":
        micro_batch_size = _micro_batch_that_trained(run_dir)
    eval_batch = config.eval.batch_size or micro_batch_size or train.batch_size
    config = _read_config(run_dir, "train.micro_batch_size=null", f"eval.batch_size={eval_batch}")
    if config.data.eval is None:
        raise UserError(f"the run in '{run_dir}' has no evaluation data", path="data.eval")
    step = _choose(_checkpoints(run_dir, config), best)
    trainer = Trainer(config, to_train=False)
    trainer.load(step)
    metrics = trainer.evaluate()
    trainer.close()
    return {"step": step, **metrics}


def _micro_batch_that_trained(run_dir: Path) -> int | None:
    try:
        found = json.loads((run_dir / "summary.json").read_text(encoding="utf-8")).get("micro_batch_size")
    except (OSError, ValueError):  # the run is still going, or was killed
        return None
    return found if isinstance(found, int) else None


def export(run_dir: Path, file_format: str, output: Path, *, best: bool) -> None:
    """Writes the weights of the newest or best checkpoint to one file, under the model's own names.

    Args:
        run_dir: the run folder.
        file_format: `safetensors`, or `state_dict` for a file that torch.load reads.
        output: the file to write; an existing one is replaced whole or not at all.
        best: the best checkpoint instead of the newest.

    Raises:
        UserError: there is no such checkpoint, or the file cannot be written.
    """
    checkpoints = _checkpoints(run_dir, _read_config(run_dir))
    step = _choose(checkpoints, best)
    weights: Mapping[str, Any] = checkpoints.load(step, "model")
    # Tied weights share memory, which safetensors refuses: every name gets its own copy.
    state = {name: tensor.clone().contiguous() for name, tensor in weights.items()}
    staged = output.with_name(f".{output.name}.new")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if file_format == "safetensors":
            from safetensors.torch import save_file

            save_file(state, staged, metadata={"format": "pt", "step": str(step)})
        else:
            torch.save(state, staged)
        os.replace(staged, output)
    except OSError as error:
        with contextlib.suppress(OSError):
            staged.unlink()
        raise UserError(f"cannot write '{output}': {error}") from error
    logger.info("%d tensors of step %d written to %s", len(state), step, output)


def _read_config(run_dir: Path, *overrides: str) -> Config:
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise UserError(f"'{run_dir}' is not a run folder: it has no config.yaml")
    # The folder may have been moved or be named from elsewhere.
    return load_config(str(file), [f"run.dir={json.dumps(str(run_dir))}", *overrides])


def _checkpoints(run_dir: Path, config: Config) -> CheckpointFolder:
    return CheckpointFolder(run_dir / "checkpoints", config.checkpoint.keep)


def _choose(checkpoints: CheckpointFolder, best: bool) -> int:
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"'{checkpoints.folder}' holds no checkpoint")
    step = checkpoints.best() if best else steps[-1]
    if step is None:
        raise UserError(f"'{checkpoints.folder}' has no best checkpoint: the run was never evaluated")
    return step
