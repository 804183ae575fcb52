"""A model as a graph that runs without its code: ONNX, or torch.export. Written, read back and compared.

Takes a while to import what it needs; only exports do.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from trainer.config import Config
from trainer.errors import UserError, one_line_text
from trainer.units import format_bytes
from trainer.weights import CheckpointWeights

logger = logging.getLogger("lockstep")

_MOST_ONNX_BYTES = 2**31 - 2**20  # a protocol buffer's limit, and some room for the graph
_NUM_SAMPLES = 3  # that outputs are compared on; the graph is made with one less
_RTOL, _ATOL = 1e-3, 1e-4

Run = Callable[[torch.Tensor], torch.Tensor]


def write_graph(
    config: Config, weights: CheckpointWeights, file_format: Literal["onnx", "torch_export"], file: Path
) -> None:
    """Writes the model of a run with these weights, in eval mode and float32, for batches of any size.

    Args:
        config: of the run, for a single process in float32.
        weights: of the same run.
        file_format: which of the two.
        file: it is written, read back and run.

    Raises:
        UserError: a package is missing, the model cannot be exported, or its outputs are others than the model's.
        OSError: the file cannot be written.
    """
    if file_format == "onnx":
        _check_onnx(weights)
    model, inputs = _model_and_inputs(config, weights)
    with torch.inference_mode():
        expected = model(inputs)
    try:
        with _silence():
            program = _exported(model, inputs[: _NUM_SAMPLES - 1])
            run = _write_onnx(program, file) if file_format == "onnx" else _write_program(program, file)
            outputs = {n: run(inputs[:n]) for n in (_NUM_SAMPLES, 1)}
    except (OSError, MemoryError):
        raise
    except Exception as error:  # exporters raise all kinds of things for models that they cannot do
        text = one_line_text(error)
        message = f"'{config.model.name}' cannot be exported as {file_format}: {type(error).__name__}: {text[:300]}"
        raise UserError(message, path="model") from error
    for n, found in outputs.items():
        _compare(found, expected[:n], file_format)


def _check_onnx(weights: CheckpointWeights) -> None:
    try:
        with _silence():
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
    except ImportError as error:
        message = f"the format onnx needs more packages ({error.name}): pip install 'lockstep-trainer[export]'"
        raise UserError(message) from error
    num_bytes = sum(weights.shape_and_dtype(name)[0].numel() for name in weights.names) * 4
    if num_bytes > _MOST_ONNX_BYTES:
        message = f"a single ONNX file holds 2 GiB, and the weights take {format_bytes(num_bytes)}: use torch_export"
        raise UserError(message)


def _model_and_inputs(config: Config, weights: CheckpointWeights) -> tuple[nn.Module, torch.Tensor]:
    """Returns the model on the host, or what makes its logits, and a real batch of what it is called with.

    Raises:
        UserError: it does not map one tensor to one tensor.
    """
    from trainer.loop import Trainer

    trainer = Trainer(config, to_train=False)
    model, task = trainer.bare_model, trainer.task
    data, _ = (trainer.eval_feed or trainer.feed).example(_NUM_SAMPLES)
    weights.load_into(model)
    model.eval()
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    results: list[Any] = []
    handles = [
        model.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True),
        model.register_forward_hook(lambda _, args, result: results.append(result)),
    ]
    with torch.inference_mode():
        task.forward(model, data)
    for handle in handles:
        handle.remove()
    trainer.close()
    message = f"only models that map one tensor to one tensor can be exported; '{config.model.name}' is called with "
    if len(calls) != 1 or len(calls[0][0]) != 1 or calls[0][1] or not isinstance(calls[0][0][0], torch.Tensor):
        what = "other things" if len(calls) == 1 else f"{len(calls)} batches"
        raise UserError(f"{message}{what} by its task", path="task")
    outputs = getattr(results[0], "logits", results[0])
    if len(results) != 1 or not isinstance(outputs, torch.Tensor):
        raise UserError(f"{message}one and returns a {type(results[0]).__name__}", path="model")
    inputs = calls[0][0][0].detach().cpu().contiguous().clone()
    # A task may hand the model more rows than there are samples; slices of them would not be batches.
    if len(inputs) != _NUM_SAMPLES or len(outputs) != _NUM_SAMPLES:
        message = f"{_NUM_SAMPLES} samples become {len(inputs)} inputs and {len(outputs)} outputs"
        raise UserError(f"only models with an output per sample can be exported: {message}", path="model")
    exported = model if outputs is results[0] else _Logits(model)
    return exported.cpu().requires_grad_(False).eval(), inputs


class _Logits(nn.Module):
    """Returns the logits of a model that returns more."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(inputs).logits
        return logits


def _exported(model: nn.Module, inputs: torch.Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model, (inputs,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)


def _write_program(program: torch.export.ExportedProgram, file: Path) -> Run:
    torch.export.save(program, file)
    return torch.export.load(file).module()


def _write_onnx(program: torch.export.ExportedProgram, file: Path) -> Run:
    import onnxruntime

    written = torch.onnx.export(program, dynamo=True, input_names=["input"], output_names=["output"], verbose=False)
    assert written is not None
    written.save(file, external_data=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0])


def _compare(found: torch.Tensor, expected: torch.Tensor, file_format: str) -> None:
    if found.shape != expected.shape:
        message = f"the exported model returns shape {list(found.shape)}, the model {list(expected.shape)}"
        raise UserError(f"not written as {file_format}: {message}", path="model")
    found, expected = found.detach().double(), expected.detach().double()
    if not torch.allclose(found, expected, rtol=_RTOL, atol=_ATOL, equal_nan=True):
        difference = float((found - expected).abs().max())
        message = f"outputs of the exported model differ from the model's by up to {difference:.3g}"
        raise UserError(f"not written as {file_format}: {message} (rtol {_RTOL:g}, atol {_ATOL:g})", path="model")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps what exporters print, log and warn of from the user, who asked for a file."""
    before = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
