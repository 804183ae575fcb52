"""The switches for speed reach torch, and change no more than they should."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Train, WriteConfig, nightly
from run_results import losses, weights
from torch import nn

from trainer.config import load_config
from trainer.config_model import OptimConfig
from trainer.errors import UserError
from trainer.loop import Trainer
from trainer.optim import build_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

CNN: dict[str, Any] = {
    "data": {"train": {"name": "digits", "args": {"split": "train"}}, "workers": 0},
    "model": {"name": "small_cnn", "args": {"width": 8}},
    "train": {"steps": 3, "batch_size": 16},
}
STACK = {"name": "fitted_model:Stack", "args": {"depth": 2}}


@pytest.fixture(autouse=True)
def _compiles_anew() -> Iterator[None]:
    yield
    torch._dynamo.reset()


# ---- the optimizer ------------------------------------------------------------------------------------------------


def groups_of(device_type: str, **settings: Any) -> dict[str, Any]:
    config = OptimConfig.model_validate({"lr": 0.1, **settings})
    return build_optimizer(config, nn.Linear(2, 2), device_type).param_groups[0]


@pytest.mark.parametrize("name", ["sgd", "adamw", "Adam"])
def test_how_parameters_are_updated(name: str) -> None:
    assert groups_of("cpu", name=name, implementation="fused")["fused"] is True
    foreach = groups_of("cpu", name=name, implementation="foreach")
    assert (foreach["foreach"], foreach["fused"]) == (True, None)
    looped = groups_of("cuda", name=name, implementation="for_loop")
    assert (looped["foreach"], looped["fused"]) == (False, None)


@pytest.mark.parametrize(("name", "fused"), [("sgd", True), ("adamw", True), ("Adam", True), ("RAdam", None)])
def test_the_choice_on_a_gpu(name: str, fused: bool | None) -> None:
    assert groups_of("cuda", name=name).get("fused") is fused


@pytest.mark.parametrize("name", ["sgd", "adamw", "Adam", "RAdam"])
def test_the_choice_on_a_cpu_is_torchs(name: str) -> None:
    group = groups_of("cpu", name=name)
    assert group.get("fused") is None
    assert group["foreach"] is None


def test_an_optimizer_without_a_fused_implementation() -> None:
    with pytest.raises(UserError, match="'RAdam' has no fused implementation") as raised:
        groups_of("cpu", name="RAdam", implementation="fused")
    assert raised.value.problems[0].path == "optim.implementation"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("fused", "for_loop"),
        pytest.param("for_loop", "fused", marks=nightly),
        pytest.param("foreach", "auto", marks=nightly),
    ],
)
def test_another_implementation_goes_on(
    first: str, second: str, train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    file = str(write_config())
    assert train("--config", file, f"optim.implementation={first}", "train.epochs=1").code == 0
    config = load_config(file, [f"optim.implementation={second}"])
    trainer = Trainer(config)
    trainer.restore()
    group = trainer.bare_optimizer.param_groups[0]
    assert bool(group["fused"]) == (second == "fused")
    if second == "for_loop":
        assert group["foreach"] is False
    trainer.close()
    outcome = train("--config", file, f"optim.implementation={second}")
    assert outcome.code == 0, outcome.err
    assert "continuing from step 5 " in outcome.out
    assert train("--config", file, f"run.dir={tmp_path / 'whole'}").code == 0
    found, whole = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert found == pytest.approx(whole, rel=1e-4)


# ---- memory format ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("setting", "expected"), [("auto", True), (True, True), (False, False)])
def test_where_convolutions_keep_their_channels(setting: bool | str, expected: bool, write_config: WriteConfig) -> None:
    trainer = Trainer(load_config(str(write_config(**CNN, model__channels_last=setting))))
    kernels = [m.weight for m in trainer.bare_model.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 1]
    assert kernels
    assert all(k.is_contiguous(memory_format=torch.channels_last) == expected for k in kernels)
    trainer.close()


def test_the_memory_format_changes_no_result(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    file = write_config(**CNN)
    assert train("--config", file, "model.channels_last=true").code == 0
    assert train("--config", file, "model.channels_last=false", f"run.dir={tmp_path / 'other'}").code == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "other"), rel=1e-4)


# ---- compile ------------------------------------------------------------------------------------------------------


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Compiles without a compiler, which takes its time; notes what was compiled and in which mode."""
    noted: list[tuple[str, Any]] = []
    compile_really = nn.Module.compile

    def quickly(self: nn.Module, *args: Any, mode: str | None = None, **kwargs: Any) -> None:
        noted.append((type(self).__name__, mode))
        compile_really(self, *args, backend="aot_eager", **kwargs)

    monkeypatch.setattr(nn.Module, "compile", quickly)
    return noted


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch looks at it while compiling
@pytest.mark.parametrize(("setting", "compiled"), [("blocks", ["Block", "Block"]), ("model", ["Stack"])])
def test_what_is_compiled(
    setting: str,
    compiled: list[str],
    modes: list[tuple[str, Any]],
    train: Train,
    write_config: WriteConfig,
    tmp_path: Path,
) -> None:
    from torch._dynamo.utils import counters

    file = write_config(model=STACK)
    assert train("--config", file, f"run.dir={tmp_path / 'plain'}").code == 0
    assert modes == []
    counters.clear()
    outcome = train("--config", file, f"model.compile={setting}")
    assert outcome.code == 0, outcome.err
    assert modes == [(name, None) for name in compiled]
    assert counters["stats"]["calls_captured"] > 0
    assert counters["graph_break"] == {}
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    plain, found = weights(tmp_path / "plain", 10), weights(tmp_path / "run", 10)
    assert list(found) == list(plain)
    assert all(torch.allclose(found[name], plain[name], rtol=1e-3, atol=1e-5) for name in plain)


def test_only_the_blocks_are_compiled(modes: list[tuple[str, Any]], write_config: WriteConfig) -> None:
    trainer = Trainer(load_config(str(write_config(model={**STACK, "compile": "blocks"}))))
    compiled = [name for name, m in trainer.bare_model.named_modules() if m._compiled_call_impl is not None]
    assert compiled == ["blocks.0", "blocks.1"]
    trainer.close()


def test_the_mode_of_the_compiler(modes: list[tuple[str, Any]], write_config: WriteConfig) -> None:
    model = {**STACK, "compile": "model", "compile_mode": "max-autotune-no-cudagraphs"}
    Trainer(load_config(str(write_config(model=model)))).close()
    assert modes == [("Stack", "max-autotune-no-cudagraphs")]


def test_a_mode_without_a_compiler(train: Train, write_config: WriteConfig) -> None:
    outcome = train("--config", write_config(model={**STACK, "compile_mode": "max-autotune"}))
    assert outcome.code == 2
    assert "compile_mode needs compile" in outcome.err


def test_a_model_without_blocks_to_compile(train: Train, write_config: WriteConfig) -> None:
    outcome = train("--config", write_config(model={"name": "vectors_model:Linear", "compile": "blocks"}))
    assert outcome.code == 2
    assert "model.compile" in outcome.err
    assert "name them in memory.blocks" in outcome.err


# ---- the type of the parameters -----------------------------------------------------------------------------------


def test_short_parameters_leave_buffers_alone(write_config: WriteConfig) -> None:
    model = {"name": "fitted_model:Stack", "args": {"depth": 2, "normed": True}, "dtype": "bfloat16"}
    trainer = Trainer(load_config(str(write_config(model=model, precision="bf16"))))
    dtypes = {name: parameter.dtype for name, parameter in trainer.bare_model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if ".norm." in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if ".norm." not in name} == {torch.bfloat16}
    assert {b.dtype for b in trainer.bare_model.buffers()} == {torch.float32, torch.int64}
    trainer.close()
