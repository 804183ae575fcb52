"""Precision: what is computed in which type, loss scaling, torch's switches, and what a machine refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import huge_pages
import pytest
import torch
from conftest import Train, WriteConfig
from resuming import TrainServer
from run_results import checkpoint, close, identical, losses, optimizer_state, summary, weights

from trainer import precision
from trainer.config import load_config
from trainer.errors import UserError
from trainer.loop import Trainer

SGD = {"name": "sgd", "lr": 0.01}


@pytest.fixture(autouse=True)
def _torch_as_it_was() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(before[0])
    cudnn.allow_tf32, cudnn.benchmark = before[1:]


@pytest.mark.parametrize(("setting", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_products_are_short_and_weights_stay_float32(
    setting: str, dtype: torch.dtype, write_config: WriteConfig
) -> None:
    trainer = Trainer(load_config(str(write_config(precision=setting))))
    seen: dict[str, list[torch.dtype]] = {"train": [], "eval": []}
    trainer.bare_model.get_submodule("layers.1").register_forward_hook(
        lambda module, inputs, output: seen["train" if module.training else "eval"].append(output.dtype)
    )
    trainer.start()
    trainer.train_step()
    trainer.evaluate()
    assert set(seen["train"]) == set(seen["eval"]) == {dtype}
    assert {p.dtype for p in trainer.bare_model.parameters()} == {torch.float32}
    state = trainer.bare_optimizer.state_dict()["state"]
    assert {v.dtype for values in state.values() for v in values.values()} == {torch.float32}
    trainer.close()


def test_parameters_in_bfloat16_where_asked(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    model = {"name": "mlp", "args": {"in_features": 8, "hidden": [16]}, "dtype": "bfloat16"}
    assert train("--config", write_config(model=model, precision="bf16")).code == 0
    assert {w.dtype for w in weights(tmp_path / "run", 10).values()} == {torch.bfloat16}
    momenta = [v.dtype for name, v in optimizer_state(tmp_path / "run", 10).items() if name.endswith("exp_avg")]
    assert set(momenta) == {torch.bfloat16}


def test_bfloat16_parameters_need_products_in_bfloat16(train: Train, write_config: WriteConfig) -> None:
    model = {"name": "mlp", "args": {"in_features": 8, "hidden": [16]}, "dtype": "bfloat16"}
    code, _, err = train("--config", write_config(model=model))
    assert code == 2
    assert "model.dtype" in err


@pytest.mark.parametrize("implementation", ["for_loop", "fused"])
def test_an_overflow_skips_the_step_and_is_counted(
    implementation: str, train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    data = {"name": "vectors:Huge", "args": {"length": 60}}
    file = write_config(precision="fp16", optim={**SGD, "implementation": implementation}, data__train=data)
    assert train("--config", file).code == 0
    assert 0 < summary(tmp_path / "run")["skipped_steps"] < 10
    assert all(w.isfinite().all() for w in weights(tmp_path / "run", 10).values())


def test_an_overflow_at_the_first_step_leaves_no_momentum(
    train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    """A fused step that is skipped has taken memory for it, and filled none of it."""
    data = {"name": "vectors:Huge", "args": {"length": 60}}
    for implementation in ("fused", "for_loop"):
        optim = {**SGD, "args": {"momentum": 0.9}, "implementation": implementation}
        run_dir = str(tmp_path / implementation)
        file = write_config(precision="fp16", optim=optim, data__train=data, run__dir=run_dir)
        torch.use_deterministic_algorithms(True)  # which fills such memory with NaN
        try:
            assert train("--config", file).code == 0
        finally:
            torch.use_deterministic_algorithms(False)
        assert summary(tmp_path / implementation)["skipped_steps"] > 0
    fused, looped = (weights(tmp_path / implementation, 10) for implementation in ("fused", "for_loop"))
    assert close(fused, looped)


def test_fp16_goes_on_with_its_loss_scale(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    """Stopped after an epoch in which the scale fell, and started again: bit for bit the uninterrupted run."""
    data = {"name": "vectors:Huge", "args": {"length": 60}}
    whole = {"precision": "fp16", "optim": SGD, "data__train": data, "run__dir": str(tmp_path / "whole")}
    assert train("--config", write_config("whole.yaml", **whole)).code == 0
    parts = {**whole, "run__dir": str(tmp_path / "parts")}
    assert train("--config", write_config("part.yaml", **parts, train__epochs=1)).code == 0
    assert checkpoint(tmp_path / "parts", 5).manifest.values["scaler"]["scale"] < 65536
    assert train("--config", write_config("part.yaml", **parts)).code == 0
    assert identical(weights(tmp_path / "parts", 10), weights(tmp_path / "whole", 10))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert summary(tmp_path / "parts")["skipped_steps"] == summary(tmp_path / "whole")["skipped_steps"] > 0


def test_a_lost_scaler_would_show(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    """What the test above would see if the scaler were not resumed."""
    file = write_config(
        precision="fp16", optim=SGD, data__train={"name": "vectors:Huge", "args": {"length": 60}}, train__epochs=1
    )
    assert train("--config", file).code == 0
    trainer = Trainer(load_config(str(file)))
    assert trainer.runtime.scaler is not None
    fresh = trainer.runtime.scaler.get_scale()
    trainer.restore()
    assert trainer.runtime.scaler.get_scale() < fresh == 65536
    trainer.close()


def test_switches_reach_torch(train: Train, write_config: WriteConfig) -> None:
    asked = {"matmul_precision": "medium", "cudnn_tf32": False, "cudnn_benchmark": True}
    assert train("--config", write_config(backends=asked)).code == 0
    assert torch.get_float32_matmul_precision() == "medium"
    assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.benchmark


def test_the_defaults_are_torchs_own(write_config: WriteConfig) -> None:
    precision.set_backends(load_config(str(write_config())).backends)
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cudnn.allow_tf32
    assert not torch.backends.cudnn.benchmark


@pytest.mark.skipif(
    not huge_pages.KERNEL_SETTING.exists() or "[madvise]" not in huge_pages.KERNEL_SETTING.read_text(),
    reason="this kernel gives huge pages to nobody, or to all that it can",
)
@pytest.mark.parametrize("wanted", [True, False])
def test_huge_pages(wanted: bool, server: TrainServer, write_config: WriteConfig, tmp_path: Path) -> None:
    model = {"name": "huge_pages:Probe", "args": {"file": str(tmp_path / "bytes")}}
    config = write_config(model=model, backends={"huge_pages": wanted})
    assert server.train("--config", config).code == 0
    assert (int((tmp_path / "bytes").read_text()) >= 2**25) == wanted


def test_huge_pages_are_left_as_the_environment_has_them(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    precision.set_backends(load_config(str(write_config())).backends)
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"


class Gpu:
    """A machine with a GPU, as far as the check looks."""

    def __init__(self, patch: pytest.MonkeyPatch, capability: tuple[int, int], torchao: bool, engine: bool) -> None:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        patch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
        patch.setattr(precision, "is_torchao_available", lambda: torchao)
        patch.setattr(precision, "is_transformer_engine_available", lambda: engine)


def test_fp8_without_a_gpu(train: Train, write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = train("--config", write_config(precision="fp8"))
    assert code == 2
    assert "precision: fp8 needs an NVIDIA GPU" in err


def test_fp8_on_an_older_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch, (8, 0), True, True)
    with pytest.raises(UserError, match=r"8\.9 or newer, NVIDIA A100 has 8\.0; use bf16"):
        precision.check_precision("fp8")


def test_fp8_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch, (9, 0), False, False)
    with pytest.raises(UserError, match="torchao or transformer-engine, and neither is installed"):
        precision.check_precision("fp8")


@pytest.mark.parametrize(("torchao", "engine"), [(True, False), (False, True)])
def test_fp8_where_all_is_there(torchao: bool, engine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch, (9, 0), torchao, engine)
    precision.check_precision("fp8")


def test_bf16_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch, (7, 0), False, False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(UserError, match="has no bfloat16; use fp16"):
        precision.check_precision("bf16")
