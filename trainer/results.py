"""What can be done with a run's results: evaluate a checkpoint, export its weights or the whole model.

Owns which checkpoint and which weights are meant, and that a file is written whole or not at all. How a model becomes
a graph is `trainer.graphs`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from trainer.checkpoint.folder import CheckpointFolder, open_folder
from trainer.checkpoint.manifest import Damaged
from trainer.checkpoint.reading import Checkpoint
from trainer.checkpoint.safetensors_file import header_of
from trainer.config import Config, load_config
from trainer.errors import UserError, one_line_text
from trainer.files import read_summary, replacing
from trainer.system import sync_folder
from trainer.weights import CheckpointWeights, Kind

logger = logging.getLogger("lockstep")

Format = Literal["safetensors", "state_dict", "onnx", "torch_export"]

_ENDINGS = {"safetensors": ".safetensors", "state_dict": ".pt", "onnx": ".onnx", "torch_export": ".pt2"}

# On one process without training, whatever the run trained on.
_ALONE = (
    "model.weights=null",  # the checkpoint has them all
    "optim.ema=null",  # averages too
    "optim.layer_decay=null",  # which may need memory.blocks
    "train.micro_batch_size=null",
    "data.resident_placement=auto",
    "memory.blocks=[]",
    "parallel.strategy=ddp",
    "parallel.shard_size=null",
    "parallel.reshard_after_forward=true",
    "parallel.cpu_offload=false",
    "parallel.sync_batchnorm=false",
    "parallel.static_graph=false",
    "parallel.gradient_compression=none",
    "parallel.pin_cores=false",
    "tracking.trackers=[]",
    "tracking.init={}",
    "tracking.samples=0",
)
# In float32 and row by row, and every sample as an evaluation sees it.
_PLAIN = (
    "precision=no",
    "model.dtype=float32",
    "model.channels_last=false",
    "data.augment={mixup: 0.0, cutmix: 0.0, mix_probability: 1.0, cutmix_share: 0.5, erase: 0.0, erase_with: zero}",
    "data.augment_repeats=1",
)


def evaluate(run_dir: Path, *, best: bool, kind: Kind | None = None) -> dict[str, float]:
    """Evaluates the newest or best checkpoint of a run on this machine and returns its metrics.

    Args:
        run_dir: the run folder.
        best: the best checkpoint instead of the newest.
        kind: averages or the last weights; None for averages where there are any.

    Raises:
        UserError: there is no such checkpoint, or the run has no evaluation data.
    """
    from trainer.loop import Trainer

    config = _read_config(run_dir)
    train = config.train
    micro_batch_size = train.micro_batch_size
    if micro_batch_size == "auto":
        micro_batch_size = _micro_batch_that_trained(run_dir)
    if not config.data.evaluates:
        raise UserError(f"the run in '{run_dir}' has no evaluation data", path="data.eval")
    weights = CheckpointWeights(_choose(open_folder(config), best), kind)
    # On this one process, however many trained: no accumulation to fit, the same evaluation batches.
    trainer = Trainer(_read_config(run_dir, *_ALONE), to_train=False)
    num_trained = weights.checkpoint.manifest.num_samples
    if config.data.eval_share is not None and trainer.plan.num_samples != num_trained:
        message = (
            f"has other samples than the {num_trained} of the run: what data.eval_share holds out would be others, "
        )
        raise UserError(message + "some of them trained", path="data.train")
    weights.load_into(trainer.bare_model)
    metrics = trainer.evaluate(micro_batch_size or train.batch_size)
    assert metrics is not None, "nobody could ask it to stop"
    trainer.close()
    logger.info("evaluated  the %s", weights)
    return {"step": weights.checkpoint.step, **metrics}


def _micro_batch_that_trained(run_dir: Path) -> int | None:
    found = read_summary(run_dir).get("micro_batch_size")  # none while the run is going, or where it was killed
    return found if isinstance(found, int) else None


def export(
    run_dir: Path,
    file_format: Format,
    output: Path,
    *,
    best: bool,
    kind: Kind | None = None,
    as_artifact: bool = False,
) -> None:
    """Writes the weights of a run's newest or best checkpoint, or the model with them, to one file.

    Args:
        run_dir: the run folder.
        file_format: `safetensors`; `state_dict` for a file that torch.load reads; `onnx` or `torch_export` for the
            whole model, which takes batches of any size.
        output: the file to write; an existing one is replaced whole or not at all.
        best: the best checkpoint instead of the newest.
        kind: averages or the last weights; None for averages where there are any.
        as_artifact: also add the file to the W&B run.

    Raises:
        UserError: there is no such checkpoint, the model cannot be exported, or the file cannot be written.
    """
    config = _read_config(run_dir)
    weights = CheckpointWeights(_choose(open_folder(config), best), kind)
    progress = weights.checkpoint.manifest.progress
    if as_artifact:
        from trainer.tracking.artifacts import check_export, log_export

        wandb_id = check_export(config, run_dir, progress.wandb_id)
    if file_format in ("onnx", "torch_export"):
        from trainer.graphs import write_graph

        plain = _read_config(run_dir, *_ALONE, *_PLAIN)
        with _replacing(output, _ENDINGS[file_format]) as staged:
            write_graph(plain, weights, file_format, staged)
    else:
        write = _write_safetensors if file_format == "safetensors" else _write_state_dict
        with _replacing(output, _ENDINGS[file_format]) as staged:
            write(weights, staged)
    logger.info("%s: %d tensors, the %s, as %s", output, len(weights.names), weights, file_format)
    if as_artifact:
        is_evaluated = progress.evaluated_step == progress.step
        metrics = {f"eval/{name}": value for name, value in progress.eval_metrics.items() if is_evaluated}
        metadata = {"step": progress.step, "format": file_format, "weights": weights.kind, **metrics}
        log_export(config, run_dir, wandb_id, output, metadata)


def _write_safetensors(weights: CheckpointWeights, file: Path) -> None:
    """Writes one tensor after the other: the whole model is never in memory."""
    entries: list[tuple[str, torch.dtype, torch.Size]] = []
    for name in weights.names:
        shape, dtype = weights.shape_and_dtype(name)
        entries.append((name, dtype, shape))
    entries.sort(key=lambda entry: -entry[1].itemsize)  # so that all are aligned without gaps
    metadata = {"format": "pt", "step": str(weights.checkpoint.step), "weights": weights.kind}
    with open(file, "wb") as stream:
        stream.write(header_of(entries, metadata))
        for name, _, _ in entries:
            stream.write(weights.read(name).reshape(-1).view(torch.uint8).numpy().data)


def _write_state_dict(weights: CheckpointWeights, file: Path) -> None:
    with open(file, "wb") as stream:  # where torch opens it itself, a full disk is a RuntimeError
        torch.save(weights.state_dict(), stream)


@contextlib.contextmanager
def _replacing(output: Path, ending: str) -> Iterator[Path]:
    """Gives a file to write beside `output`, which takes its place once it is whole and on the disk."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir():
            raise IsADirectoryError("it is a folder")
        with replacing(output, ending) as staged:
            yield staged
            with open(staged, "rb") as stream:
                os.fsync(stream.fileno())
        sync_folder(output.parent)
    except OSError as error:
        raise UserError(f"cannot write '{output}': {one_line_text(error)}") from error


def _read_config(run_dir: Path, *overrides: str) -> Config:
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise UserError(f"'{run_dir}' is not a run folder: it has no config.yaml")
    # The folder may have been moved or be named from elsewhere.
    return load_config(str(file), [f"run.dir={json.dumps(str(run_dir))}", *overrides])


def _choose(folder: CheckpointFolder, best: bool) -> Checkpoint:
    if not best:
        return folder.newest()
    step = folder.best()
    if step is None:
        what = "no best checkpoint: the run was never evaluated, or it is gone" if folder.steps() else "no checkpoint"
        raise UserError(f"'{folder.location}' holds {what}")
    try:
        checkpoint = folder.open(step)
        checkpoint.verify()
    except Damaged as error:
        raise UserError(f"'{folder.location}/{folder.name(step)}': {error}") from error
    return checkpoint
