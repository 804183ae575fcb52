"""Weight decay and rates by parameter, against timm's and torchvision's own; and runs with several groups."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import yaml
from conftest import REPOSITORY, Train, WriteConfig, nightly
from resuming import assert_same_end, interrupted
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from vectors_model import Blocks

from trainer.config import load_config
from trainer.config_model import OptimConfig
from trainer.errors import UserError
from trainer.loop import Trainer
from trainer.optim import build_optimizer
from trainer.param_groups import choose_treatments, describe_groups, parameters_named

DECAY = 0.05
Settings = dict[str, tuple[float, float]]  # (share of the rate, weight decay) by parameter name


def on_meta(library: Any, name: str, **args: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = library(name, **args)
    return model


def optimizer_of(model: nn.Module, **optim: Any) -> torch.optim.Optimizer:
    config = OptimConfig.model_validate({"name": "adamw", "lr": 0.1, "weight_decay": DECAY, **optim})
    return build_optimizer(config, model, "cpu")


def settings_of(groups: list[dict[str, Any]], model: nn.Module) -> Settings:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: (g.get("lr_scale", 1.0), g["weight_decay"]) for g in groups for p in g["params"]}


# ---- against the peers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_decay", [None, 0.75])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "resnet18"])
def test_timm_models_are_grouped_as_by_timm(name: str, layer_decay: float | None) -> None:
    model = on_meta(timm.create_model, name)
    model.get_parameter(next(iter(dict(model.named_parameters())))).requires_grad_(False)  # a layer keeps its number
    listed = sorted(getattr(model, "no_weight_decay", set)())
    listed = [name for name in listed if name in dict(model.named_parameters())]
    settings: dict[str, Any] = {"weight_decay": DECAY, "no_weight_decay_list": listed}
    if layer_decay is None:
        expected = param_groups_weight_decay(model, **settings)
    else:
        expected = param_groups_layer_decay(model, layer_decay=layer_decay, **settings)
    optimizer = optimizer_of(model, no_weight_decay=["vector", *listed], layer_decay=layer_decay)
    assert settings_of(optimizer.param_groups, model) == settings_of(expected, model)
    assert len(optimizer.param_groups) == len(expected)


def set_weight_decay(model: nn.Module, own_keys: list[str]) -> Settings:
    """What torchvision's reference `set_weight_decay` gives with 0 for normalizations and for these keys."""
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
    return {
        f"{prefix}.{name}" if prefix else name: (1.0, 0.0 if name in own_keys or isinstance(module, norms) else DECAY)
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "swin_t", "convnext_tiny"])
def test_kinds_are_those_of_torchvisions_reference(name: str) -> None:
    model = on_meta(torchvision.models.get_model, name)
    tables = {"vit_b_16": ["class_token", "pos_embedding"], "swin_t": ["relative_position_bias_table"]}.get(name, [])
    for kinds, keys in (
        (["norm"], []),
        (["norm", "bias", *tables], ["bias", *tables]),
    ):
        optimizer = optimizer_of(model, no_weight_decay=kinds)
        assert settings_of(optimizer.param_groups, model) == set_weight_decay(model, keys)


def test_norms_of_a_models_own() -> None:
    class LlamaRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

    model = nn.Sequential(nn.Linear(2, 2), LlamaRMSNorm(), nn.RMSNorm(2))
    found = settings_of(optimizer_of(model, no_weight_decay=["norm"]).param_groups, model)
    assert {name for name, (_, decay) in found.items() if decay == 0} == {"1.weight", "2.weight"}


# ---- layers of other models ------------------------------------------------------------------------------------


def test_layers_are_the_repeated_blocks() -> None:
    model = on_meta(torchvision.models.get_model, "convnext_tiny")
    found = settings_of(optimizer_of(model, layer_decay=0.5).param_groups, model)
    layers = {name: 19 - torch.tensor(1 / scale).log2().round().int().item() for name, (scale, _) in found.items()}
    assert layers["features.0.0.weight"] == 0
    assert layers["features.1.0.block.0.weight"] == 1
    assert layers["features.1.2.layer_scale"] == 3
    assert layers["features.2.1.weight"] == 4  # between two stages
    assert layers["features.3.0.block.0.weight"] == 4
    assert layers["features.7.2.block.0.weight"] == 18
    assert layers["classifier.0.weight"] == layers["classifier.2.bias"] == 19


def test_blocks_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    config = OptimConfig(name="sgd", lr=0.1, layer_decay=0.5)
    chosen = choose_treatments(config, model, ["1"])
    assert [chosen[f"{i}.weight"].lr_scale for i in range(3)] == [0.25, 0.5, 1.0]
    with pytest.raises(UserError, match=r"no repeated blocks.*memory\.blocks"):
        choose_treatments(config, model)


def test_the_line_that_a_run_says() -> None:
    model = Blocks(depth=4)
    assert describe_groups(optimizer_of(model)) == "AdamW: 20 tensors of parameters, weight decay 0.05 on 20"
    optimizer = optimizer_of(model, no_weight_decay=["vector"], layer_decay=0.5)
    expected = "weight decay 0.05 on 6, weight decay 0 on 14, 6 rates, 0.0312 to 1 of optim.lr"
    assert describe_groups(optimizer) == f"AdamW: 20 tensors of parameters, {expected}"
    optimizer = optimizer_of(model, name="Muon", rest={"name": "sgd", "lr": 0.01, "weight_decay": 0.0})
    expected = "SGD: 15 tensors of parameters, weight decay 0 on 15, 0.1 of optim.lr on 15"
    assert describe_groups(optimizer) == f"Muon: 5 tensors of parameters, weight decay 0.05 on 5; {expected}"


# ---- two optimizers --------------------------------------------------------------------------------------------


class Text(nn.Module):
    """Token ids (B, T) -> logits (B, T, 7), from matrices and what Muon cannot or should not take."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 6)
        self.hidden = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.hidden(self.embedding(ids))))


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    ids = torch.arange(7)[None]
    nn.functional.cross_entropy(model(ids)[0], ids[0].flip(0)).backward()
    for optimizer in optimizers:
        optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()


REST: dict[str, Any] = {"name": "adamw", "lr": 0.01, "weight_decay": 0.1, "args": {"betas": [0.8, 0.9]}}
MUON: dict[str, Any] = {"name": "Muon", "lr": 0.02, "rest": REST}


def test_two_optimizers_are_two_by_hand() -> None:
    ours, theirs = Text(), Text()
    optimizer = optimizer_of(ours, **MUON)
    others = [p for name, p in theirs.named_parameters() if name != "hidden.weight"]
    by_hand = (
        torch.optim.Muon([theirs.hidden.weight], lr=0.02, weight_decay=DECAY),
        torch.optim.AdamW(others, lr=0.01, weight_decay=0.1, betas=(0.8, 0.9)),
    )
    for _ in range(3):
        step(ours, optimizer)
        step(theirs, *by_hand)
    copy = Text()
    copy.load_state_dict(ours.state_dict())
    again = optimizer_of(copy, **MUON)
    again.load_state_dict(deepcopy(optimizer.state_dict()))
    for model, one in ((ours, optimizer), (copy, again)):
        step(model, one)
        assert len(one.state) == len(list(model.parameters()))
    step(theirs, *by_hand)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name
        assert torch.equal(copy.get_parameter(name), parameter), name


def test_what_the_rest_takes() -> None:
    model = Text()
    names = {parameter: name for name, parameter in model.named_parameters()}

    def rest_of(match: list[str]) -> set[str]:
        optim = {**MUON, "name": "sgd", "rest": {"name": "adamw", "match": match}}
        chosen = choose_treatments(OptimConfig.model_validate(optim), model)
        return {name for name, treatment in chosen.items() if treatment.is_rest}

    assert rest_of(["embedding"]) == {"embedding.weight"}
    assert rest_of(["last_layer"]) == {"head.weight", "head.bias"}
    assert rest_of(["not_matrix"]) == {name for p, name in names.items() if p.ndim != 2}
    assert rest_of(["hidden", "*.bias"]) == {"hidden.weight", "hidden.bias", "norm.bias", "head.bias"}


def test_the_implementation_is_of_those_that_have_it() -> None:
    groups = optimizer_of(Text(), **MUON, implementation="foreach").param_groups
    assert [group.get("foreach") for group in groups] == [None, True]
    with pytest.raises(UserError, match="has no fused implementation"):
        optimizer_of(Text(), **{**MUON, "rest": {"name": "Rprop", "weight_decay": 0}}, implementation="fused")


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"no_weight_decay": ["pos_embd"]}, r"optim.no_weight_decay: 'pos_embd' names no parameter"),
        ({"no_weight_decay": ["hiden"]}, r"did you mean 'hidden'\?"),
        ({"no_weight_decay": ["*"]}, "optim.no_weight_decay: leaves nothing that is trained to weight_decay"),
        ({"rest": {"name": "sgd", "match": ["*"]}}, "leaves none to 'adamw'"),
        ({"rest": {"name": "sgd", "match": ["nobody"]}}, "optim.rest.match: 'nobody' names no parameter"),
        ({"name": "Muon", "rest": {"name": "sgd", "match": ["embedding"]}}, "Muon only supports 2D parameters"),
        ({"rest": {"name": "Rprop"}}, "optim.rest.weight_decay: 'Rprop' has no weight decay"),
        ({"rest": {"name": "sgd", "args": {"lr": 1}}}, "optim.rest.args.lr: set it as optim.rest.lr"),
        ({"rest": {"name": "sgd", "args": {"fused": True}}}, "set it as optim.implementation"),
        ({"name": "test_param_groups:forgetful", "layer_decay": 0.5}, "does not keep the groups"),
    ],
)
def test_refused(optim: dict[str, Any], message: str) -> None:
    model = Blocks(depth=2) if "layer_decay" in optim else Text()
    with pytest.raises(UserError, match=message):
        optimizer_of(model, **optim)


def forgetful(params: Any, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for group in params for p in group["params"]], lr, weight_decay=weight_decay)


def test_kinds_that_a_model_has_not() -> None:
    model = nn.Linear(2, 2)
    optimizer_of(model, no_weight_decay=["norm", "bias"])
    with pytest.raises(UserError, match="matches no parameter"):
        optimizer_of(model, no_weight_decay=["norm"])
    frozen = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2).requires_grad_(False))
    with pytest.raises(UserError, match="matches no parameter that is trained"):
        optimizer_of(frozen, no_weight_decay=["norm"])


def test_patterns_name_tied_parameters_by_each_of_their_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    assert parameters_named(model, ["b"], "") == {model["a"].weight, model["b"].bias}


BLOCKS_IN_DOCS = re.findall(
    r"```yaml\n(.*?)```",
    (REPOSITORY / "docs" / "recipes.md").read_text().partition("\n## Optimizer\n")[2].partition("\n## ")[0],
    re.DOTALL,
)


@pytest.mark.parametrize("text", BLOCKS_IN_DOCS)
def test_settings_in_the_docs_load(text: str, write_config: WriteConfig) -> None:
    file = write_config()
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | yaml.safe_load(text)))
    load_config(str(file))


# ---- runs ------------------------------------------------------------------------------------------------------

BLOCKS = {"name": "vectors_model:Blocks", "args": {"depth": 3}}
RUNS: dict[str, dict[str, Any]] = {
    "layers": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1, "no_weight_decay": ["norm"], "layer_decay": 0.7},
    "muon": {**MUON, "weight_decay": 0.01, "no_weight_decay": ["bias"], "layer_decay": 0.7, "ema": {"decay": 0.9}},
    "lamb": {"name": "timm.optim:Lamb", "lr": 0.01, "weight_decay": 0.1, "no_weight_decay": ["vector"]},
    "foreach": {"name": "sgd", "lr": 0.1, "args": {"momentum": 0.9}, "implementation": "foreach", "layer_decay": 0.5},
    "fused": {"name": "Adam", "lr": 0.01, "implementation": "fused", "layer_decay": 0.5},
}


@pytest.mark.parametrize("name", [n if n in ("muon", "lamb") else pytest.param(n, marks=nightly) for n in RUNS])
def test_bit_for_bit_over_an_interruption(name: str, train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    schedule = {"name": "cosine", "warmup": 2}
    interrupted(train, write_config, tmp_path, 61, model=BLOCKS, optim=RUNS[name], schedule=schedule)
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_rates_of_a_step(precision: str, write_config: WriteConfig, tmp_path: Path) -> None:
    optim = {**MUON, "layer_decay": 0.5}
    file = write_config(model=BLOCKS, optim=optim, schedule={"name": "linear"}, precision=precision)
    trainer = Trainer(load_config(str(file)))
    names = {parameter: name for name, parameter in trainer.bare_model.named_parameters()}
    trainer.start()
    before = {name: p.detach().clone() for p, name in names.items()}
    for at in range(3):
        assert trainer.train_step()
        share = 1 - at / 10
        rates = {names[p]: g["lr"] for g in trainer.optimizer.param_groups for p in g["params"]}
        assert rates["head.weight"] == pytest.approx(0.01 * share)
        assert rates["blocks.2.layer.weight"] == pytest.approx(0.02 * share * 0.5)
        assert rates["blocks.0.layer.bias"] == pytest.approx(0.01 * share * 0.5**3)
        assert rates["stem.weight"] == pytest.approx(0.02 * share * 0.5**4)
    assert all(not torch.equal(before[name], p) for p, name in names.items())
    trainer.close()


def test_a_checkpoint_of_other_groups_is_refused(train: Train, write_config: WriteConfig) -> None:
    optim = RUNS["layers"]
    assert train("--config", write_config(model=BLOCKS, optim=optim, train__epochs=1)).code == 0
    longer = {"model": BLOCKS, "train__epochs": 2}
    code, _, err = train("--config", write_config(optim={**optim, "no_weight_decay": ["bias"]}, **longer))
    assert (code, err.count("\n")) == (2, 1)
    assert "optim.no_weight_decay: ['norm'] in the checkpoint, ['bias'] now; this cannot change in a run" in err
    code, _, err = train("--config", write_config(optim=optim, memory={"blocks": ["blocks.0"]}, **longer))
    assert (code, err.count("\n")) == (2, 1)
    assert "has other groups of parameters; with optim.layer_decay they are by memory.blocks: change that back" in err
    allowed = {"optim": {**optim, "layer_decay": 0.9}, "checkpoint": {"allow_changes": ["optim.layer_decay"]}}
    code, out, err = train("--config", write_config(**allowed, **longer))
    assert code == 0, err
    assert "optim.layer_decay: 0.7 -> 0.9" in out
    assert "5 rates, 0.656 to 1 of optim.lr" in out


def test_a_plan_of_several_groups(train: Train, write_config: WriteConfig) -> None:
    optim = {**MUON, "layer_decay": 0.5}
    fitted = {"train__micro_batch_size": "auto", "memory": {"target": "200MiB"}}
    done = train("--config", write_config(model=BLOCKS, optim=optim, **fitted))
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim__no_weight_decay": ["norm"]}, "optim: no_weight_decay has no effect without weight_decay"),
        ({"optim__layer_decay": 0}, "optim.layer_decay: must be greater than 0"),
        ({"optim__layer_decay": 1.0}, "optim.layer_decay: must be less than 1"),
        (
            {
                "optim__layer_decay": 0.5,
                "memory__blocks": ["blocks.0"],
                "model": {"name": "timm:test_vit", "args": {"in_chans": 1, "img_size": 8, "patch_size": 4}},
            },
            "memory.blocks: has no effect on optim.layer_decay: timm tells",
        ),
        ({"optim__layer_decay": 0.5}, "optim.layer_decay: the model has no repeated blocks"),
        ({"optim__rest": {"lr": 0.1}}, "optim.rest.name: required, but not set"),
        ({"optim__rest": {"name": "sgd", "match": []}}, "optim.rest.match: "),
        ({"optim__clip_norm": 1.0, "optim__clip_value": 1.0}, "optim: clip_norm and clip_value are two ways to clip"),
        ({"memory__blocks": ["layers.1"]}, "memory.blocks: has no effect without"),
    ],
)
def test_refused_in_one_line(changes: dict[str, Any], message: str, train: Train, write_config: WriteConfig) -> None:
    code, _, err = train("--config", write_config(**changes))
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
