"""Blocks that are computed again in backward: the same bits, and less kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from checkpointed_models import MODELS, UsersBlock, build, images, mixed
from conftest import few
from torch import nn

from trainer.memory.blocks import repeated_blocks
from trainer.memory.checkpointing import Policy, apply_checkpointing, uniform_policies

pytestmark = pytest.mark.usefixtures("one_thread")

PLANS: dict[str, Callable[[list[str]], Mapping[str, Policy]]] = {
    "full": lambda names: uniform_policies(names, "full"),
    "every_2": lambda names: uniform_policies(names, "every_2"),
    "selective": lambda names: uniform_policies(names, "selective"),
    "mixed": mixed,
}


class Outcome(NamedTuple):
    losses: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    kept_bytes: int


def prepared(model: nn.Module, plan: str) -> nn.Module:
    blocks = repeated_blocks(model)
    if plan != "none":
        apply_checkpointing(blocks, PLANS[plan](list(blocks)))
    return model


def trained(
    model: nn.Module, name: str, steps: int = 1, forwards: int = 1, autocast: torch.dtype | None = None
) -> Outcome:
    """Trains with plain SGD; a step has that many forwards before one backward, or so many of both if negative."""
    torch.manual_seed(1)
    losses: list[torch.Tensor] = []
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for step in range(steps):
        model.zero_grad()
        pending = []
        for micro in range(abs(forwards)):
            precision = torch.autocast("cpu", dtype=autocast, enabled=autocast is not None)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), precision:
                loss = model(images(name, 2, seed=10 * step + micro)).float().square().mean()
            pending.append(loss)
            if forwards < 0:
                pending.pop().backward()
            losses.append(loss.detach())
        for loss in pending:
            loss.backward()
        with torch.no_grad():
            for parameter in model.parameters() if step < steps - 1 else ():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=0.01)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Outcome(losses, gradients, {n: b.clone() for n, b in model.named_buffers()}, sum(kept.values()))


def assert_same(got: Outcome, expected: Outcome) -> None:
    assert all(loss.isfinite() for loss in expected.losses)
    assert sum(bool(g.any()) for g in expected.gradients.values()) > 0.5 * len(expected.gradients)
    for a, b in zip(got.losses, expected.losses, strict=True):
        assert torch.equal(a, b)
    for ours, theirs in ((got.gradients, expected.gradients), (got.buffers, expected.buffers)):
        assert list(ours) == list(theirs)
        assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []


@pytest.mark.parametrize("name", few(MODELS, "users"))
def test_same_bits_as_without(name: str) -> None:
    model = build(name)
    expected = trained(copy.deepcopy(model), name)
    for plan in PLANS:
        got = trained(prepared(copy.deepcopy(model), plan), name)
        assert_same(got, expected)


# The block's first submodule that is certainly computed again.
INNER = {
    "resnet50": "bn1",
    "convnext_tiny": "block.2",
    "vit_b_16": "ln_1",
    "swin_t": "norm1",
    "efficientnet_b0": "block.0.1",
    "users": "norm",
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_not_kept_is_computed_again(name: str) -> None:
    calls: dict[str, int] = {}
    model = build(name)
    blocks = repeated_blocks(model)
    policies = mixed(list(blocks))
    assert set(policies.values()) == {"none", "selective", "full"}
    for block_name, block in blocks.items():
        inner = block.get_submodule(INNER[name])
        inner.register_forward_hook(lambda *_, b=block_name: calls.update({b: calls.get(b, 0) + 1}))
    model(images(name, 2, 0)).square().mean()
    plain = dict(calls)
    calls.clear()
    apply_checkpointing(blocks, policies)
    model(images(name, 2, 0)).square().mean().backward()
    assert calls == {b: times * (1 if policies[b] == "none" else 2) for b, times in plain.items()}


@pytest.mark.parametrize("name", few(["resnet50", "vit_b_16"], "resnet50"))
def test_less_is_kept(name: str) -> None:
    model = build(name)
    kept = {p: trained(prepared(copy.deepcopy(model), p), name).kept_bytes for p in ("none", "selective", "full")}
    assert kept["full"] < 0.6 * kept["none"]
    assert kept["full"] < kept["selective"] < kept["none"]


def test_selective_computes_no_product_convolution_or_attention_again() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            base = func.overloadpacket.__name__
            seen[base] = seen.get(base, 0) + 1
            return func(*args, **(kwargs or {}))

    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Sequential(nn.Conv1d(6, 6, 1), layer), nn.Sequential(nn.Conv1d(6, 6, 1), layer))
    again: dict[str, dict[str, int]] = {}
    for plan in ("none", "selective", "full"):
        apply_checkpointing({"0": model[0], "1": model[1]}, uniform_policies(["0", "1"], plan))
        seen: dict[str, int] = {}
        with Count():
            model(torch.randn(2, 6, 16)).square().mean().backward()
        again[plan] = seen
    kept = ["convolution", "addmm", "_scaled_dot_product_flash_attention_for_cpu"]
    assert all(again["selective"][op] == again["none"][op] > 0 for op in kept)
    assert all(again["full"][op] > again["none"][op] for op in kept)
    assert again["selective"]["native_layer_norm"] > again["none"]["native_layer_norm"]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", few(["resnet50", "users"], "users"))
@pytest.mark.parametrize("forwards", [-2, 2])
def test_accumulation(name: str, plan: str, forwards: int) -> None:
    """Two steps of two micro-batches each; with 2, both forwards come before the first backward."""
    model = build(name)
    expected = trained(copy.deepcopy(model), name, steps=2, forwards=forwards)
    got = trained(prepared(copy.deepcopy(model), plan), name, steps=2, forwards=forwards)
    assert_same(got, expected)
    if name == "resnet50":
        assert got.buffers["layer1.0.bn1.num_batches_tracked"] == 4


@pytest.mark.parametrize("plan", few(PLANS, "mixed"))
def test_autocast_is_kept(plan: str) -> None:
    model = build("swin_t")
    expected = trained(copy.deepcopy(model), "swin_t", autocast=torch.bfloat16)
    dtypes = []
    for block in repeated_blocks(model).values():
        block.get_submodule("mlp.1").register_forward_hook(lambda m, a, out: dtypes.append(out.dtype))
    assert_same(trained(prepared(model, plan), "swin_t", autocast=torch.bfloat16), expected)
    assert len(dtypes) > 12
    assert set(dtypes) == {torch.bfloat16}


@pytest.mark.parametrize("plan", PLANS)
def test_autocast_with_a_block_used_twice(plan: str) -> None:
    """Selective keeps no cast weights from one use to the next, so the two gradients are added in float32."""
    model = build("users")
    expected = trained(copy.deepcopy(model), "users", autocast=torch.bfloat16)
    got = trained(prepared(model, plan), "users", autocast=torch.bfloat16)
    if plan == "full":
        assert_same(got, expected)
    assert torch.equal(got.losses[0], expected.losses[0])
    for key, gradient in got.gradients.items():
        scale = float(expected.gradients[key].abs().max())
        torch.testing.assert_close(gradient, expected.gradients[key], atol=0.02 * scale, rtol=0)


def test_the_model_stays_what_it_is() -> None:
    model = build("users")
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    prepared(model, "selective")
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes
    model.load_state_dict(build("users").state_dict())


@pytest.mark.parametrize("plan", ["selective", "full"])
def test_a_deep_copy_computes_with_its_own_values(plan: str) -> None:
    model = build("users")
    prepared(model, plan)
    twin = copy.deepcopy(model)
    expected = trained(build("users"), "users")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert_same(trained(twin, "users"), expected)
    assert not any(p.grad is not None for p in model.parameters())
    assert not any(b.any() for b in model.buffers())


def test_without_gradients_nothing_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(build("users"), "full")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("trainer.memory.checkpointing.checkpoint", fail)
    with torch.no_grad():
        model(images("users", 2, 0))
    with pytest.raises(AssertionError):
        model(images("users", 2, 0))


@pytest.mark.parametrize("plan", PLANS)
def test_evaluation_mode_with_gradients(plan: str) -> None:
    model = build("users").eval()
    assert_same(trained(prepared(copy.deepcopy(model), plan), "users"), trained(copy.deepcopy(model), "users"))


def test_backward_twice_over_one_forward() -> None:
    gradients = []
    for plan in ("none", "full"):
        model = prepared(build("users"), plan)
        torch.manual_seed(1)
        loss = model(images("users", 2, 0)).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_applying_again_replaces() -> None:
    model = build("efficientnet_b0")
    blocks = repeated_blocks(model)
    in_place = [m for m in model.modules() if getattr(m, "inplace", False)]
    before = {name: dict(block.__dict__) for name, block in blocks.items()}
    apply_checkpointing(blocks, uniform_policies(list(blocks), "full"))
    apply_checkpointing(blocks, uniform_policies(list(blocks), "selective"))
    assert not any(m.inplace for b in blocks.values() for m in b.modules() if hasattr(m, "inplace"))
    assert trained(model, "efficientnet_b0").kept_bytes
    apply_checkpointing(blocks, {})
    assert {name: dict(block.__dict__) for name, block in blocks.items()} == before
    assert [m for m in model.modules() if getattr(m, "inplace", False)] == in_place


def test_every_2() -> None:
    assert uniform_policies(["a", "b", "c"], "every_2") == {"a": "full", "b": "none", "c": "full"}


# ---- buffers ---------------------------------------------------------------------------------------------------


class Codebook(nn.Module):
    """A big buffer that its forward changes, maybe through `.data`, beside a big one that it never does."""

    table: torch.Tensor
    mask: torch.Tensor

    def __init__(self, hidden: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("table", torch.ones(200, 200))
        self.register_buffer("mask", torch.ones(200, 200))
        self.hidden, self.decay = hidden, 0.1

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        out = self.linear(inputs * self.table[0, :8].clone()).exp()
        if self.decay:
            (self.table.data if self.hidden else self.table).mul_(1 - self.decay)
        return out * self.mask[0, :8]


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_big_buffers(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for plan in ("none", policy):
        torch.manual_seed(0)
        block = Codebook()
        apply_checkpointing({"block": block}, {"block": plan})
        for _ in range(3):
            block(torch.ones(2, 8)).sum().backward()
        gradients.append([block.linear.weight.grad, block.table])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    cloned = []
    clone = torch.Tensor.clone

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        cloned.append(tensor.data_ptr())
        return clone(tensor)

    monkeypatch.setattr(torch.Tensor, "clone", noted)
    block(torch.ones(2, 8))
    assert block.table.data_ptr() in cloned
    assert block.mask.data_ptr() not in cloned


def test_a_big_buffer_that_changes_late_is_told(caplog: pytest.LogCaptureFixture) -> None:
    block = Codebook(hidden=False)
    apply_checkpointing({"layers.3": block}, {"layers.3": "full"})
    block.decay = 0.0
    block(torch.ones(2, 8)).sum().backward()
    assert not caplog.records
    block.decay = 0.1
    block(torch.ones(2, 8)).sum().backward()
    assert "block layers.3: its buffer table changed in a forward for the first time" in caplog.text
    assert torch.equal(block.table, torch.ones(200, 200) * 0.9)
    caplog.clear()
    block(torch.ones(2, 8)).sum().backward()
    assert not caplog.records


# ---- inputs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_inputs_and_outputs_of_any_structure(policy: Policy) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, pair: list[torch.Tensor], *, options: dict[str, Any], flag: bool) -> dict[str, Any]:
            assert flag
            return {"sum": self.linear(pair[0]).tanh() + pair[1] * options["gain"], "name": options["name"]}

    results = []
    for plan in ("none", policy):
        torch.manual_seed(0)
        block = Nested()
        apply_checkpointing({"block": block}, {"block": plan})
        pair = [torch.ones(2, 4, requires_grad=True), torch.ones(2, 4, requires_grad=True)]
        gain = torch.full((4,), 2.0, requires_grad=True)
        out = block(pair, options={"gain": gain, "name": "n"}, flag=True)
        assert out["name"] == "n"
        out["sum"].square().sum().backward()
        results.append([t.grad for t in (*pair, gain, *block.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_attention_with_dropout_is_computed_again() -> None:
    """Otherwise its random numbers would be missing when what comes after it is computed again."""
    from trainer.memory.checkpointing import CheckpointPolicy, _selective_policy

    q = torch.zeros(1)
    for op in (
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    ):
        assert _selective_policy(None, op, q, q, q) is CheckpointPolicy.MUST_SAVE
        assert _selective_policy(None, op, q, q, q, 0.0, True) is CheckpointPolicy.MUST_SAVE
        assert _selective_policy(None, op, q, q, q, 0.1) is CheckpointPolicy.PREFER_RECOMPUTE
        assert _selective_policy(None, op, q, q, q, dropout_p=0.1) is CheckpointPolicy.PREFER_RECOMPUTE
    for op in (
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    ):
        assert _selective_policy(None, op, q, q, q, None, True) is CheckpointPolicy.MUST_SAVE
        assert _selective_policy(None, op, q, q, q, None, True, 0.1) is CheckpointPolicy.PREFER_RECOMPUTE
    for save in (torch.ops.aten._scaled_mm.default, torch.ops._c10d_functional.all_reduce.default):
        assert _selective_policy(None, save) is CheckpointPolicy.MUST_SAVE
    for recompute in (torch.ops.aten.add.Tensor, torch.ops.aten.native_layer_norm.default):
        assert _selective_policy(None, recompute) is CheckpointPolicy.PREFER_RECOMPUTE


def test_the_users_block_has_what_goes_wrong() -> None:
    """Without buffers as they were, the gradients differ: the tests above would notice."""
    block = UsersBlock(4)
    inputs = torch.randn(6, 4)
    torch.manual_seed(0)
    first = block(inputs)
    torch.manual_seed(0)
    assert not torch.equal(first, block(inputs))
