"""A rank of test_fsdp_dist.py: trains one config after the other in one process group, and writes down what it saw.

    fsdp_worker.py CONFIG...     # leaves CONFIG's stem + `-WORLD-RANK.json`, and on rank 0 `-WORLD.pt` with the weights

torch.compile is given a backend that compiles nothing but goes the same way, in a tenth of the time.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor

from trainer.config import load_config
from trainer.errors import UserError
from trainer.loop import Trainer
from trainer.memory.blocks import repeated_blocks

WORLD, RANK = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
COMPILE = nn.Module.compile


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def sharded(model: nn.Module) -> list[str]:
    return sorted(name for name, module in model.named_modules() if isinstance(module, FSDPModule))


def is_offloaded(module: nn.Module) -> bool:
    assert isinstance(module, FSDPModule)
    groups = module._get_fsdp_state()._fsdp_param_groups
    return any(isinstance(group.offload_policy, CPUOffloadPolicy) for group in groups)


def gathered(model: nn.Module) -> list[str]:
    """Returns which of the model's blocks have their parameters whole."""
    blocks = {name: model.get_submodule(name).parameters() for name in sharded(model) if name}
    return [name for name, parameters in blocks.items() if not any(isinstance(p, DTensor) for p in parameters)]


def layout(trainer: Trainer) -> dict[str, Any]:
    """Returns how model and optimizer are spread."""
    parameters = dict(trainer.bare_model.named_parameters())
    local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters.values()]
    in_optimizer = [id(p) for group in trainer.bare_optimizer.param_groups for p in group["params"]]
    return {
        "same_module": trainer.model is trainer.bare_model,
        "names": sorted(trainer.bare_model.state_dict()),
        "fsdp_modules": sharded(trainer.bare_model),
        "offloaded": [n for n in sharded(trainer.bare_model) if is_offloaded(trainer.bare_model.get_submodule(n))],
        "all_shared": all(isinstance(p, DTensor) for p in parameters.values()),
        "share": sum(map(torch.Tensor.numel, local)) / sum(p.numel() for p in parameters.values()),
        "dtypes": sorted({str(p.dtype) for p in parameters.values()}),
        "frozen": sorted(n for n, p in parameters.items() if not p.requires_grad),
        "optimizer_has_them": in_optimizer == [id(p) for p in parameters.values() if p.requires_grad],
    }


def trained(file: Path) -> dict[str, Any]:
    config = load_config(str(file))
    compiled = CompileCounterWithBackend("aot_eager")
    nn.Module.compile = lambda module, **_: COMPILE(module, backend=compiled)  # type: ignore[method-assign]
    trainer = Trainer(config)
    found: dict[str, Any] = {"before": layout(trainer), "blocks": sorted(repeated_blocks(trainer.bare_model))}
    found["micro_batch_size"] = trainer.plan.micro_batch_size
    gathered_after_forward: list[list[str]] = []
    trainer.bare_model.register_forward_hook(lambda model, *_: gathered_after_forward.append(gathered(model)))
    trainer.start()
    losses, norms = [], []
    while trainer.progress.step < trainer.total_steps:
        trainer.train_step()
        window = trainer.window
        totals = trainer.runtime.sum({"loss": window.loss_sum, "count": torch.tensor(window.num_samples)})
        losses.append(totals["loss"] / totals["count"])
        if window.grad_norm is not None:
            assert type(window.grad_norm) is torch.Tensor
            norms.append(float(window.grad_norm))
        trainer.report()
        if trainer.eval_feed is not None and trainer.progress.step == 2:
            trainer.evaluate()  # in the midst of training, which goes on as if nothing had been
    metrics = trainer.evaluate() if trainer.eval_feed is not None else {}
    found |= {"after": layout(trainer), "losses": losses, "norms": norms, "metrics": metrics}
    found["skipped_steps"] = trainer.progress.skipped_steps
    found["skipped_samples"] = trainer.num_skipped()
    scaler = trainer.runtime.scaler
    found["scale"] = scaler.get_scale() if scaler is not None else None
    state: dict[str, torch.Tensor] = {name: whole(tensor) for name, tensor in trainer.bare_model.state_dict().items()}
    if RANK == 0:
        torch.save(state, file.with_name(f"{file.stem}-{WORLD}.pt"))
    found["gathered_after_forward"] = gathered_after_forward[0]
    found["compiled"] = compiled.frame_count
    found["classes"] = sorted({type(module).__name__ for module in trainer.bare_model.modules()})
    trainer._close_feeds()
    trainer.stop_requests.release_signals()
    return found


def main(files: list[str]) -> None:
    warnings.filterwarnings("error", module=r"torch\.distributed")
    torch.set_num_threads(1)
    for file in map(Path, files):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        try:
            found = trained(file)
        except UserError as error:
            found = {"error": str(error)}
        file.with_name(f"{file.stem}-{WORLD}-{RANK}.json").write_text(json.dumps(found))
        print("done:", file.stem, flush=True)
    os._exit(0)  # gloo sometimes aborts a tidy end where a model under DDP is still alive


if __name__ == "__main__":
    main(sys.argv[1:])
