"""The language-modelling task, the transformer and the text of the example, and a run of them together."""

from __future__ import annotations

import json
import math
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import language_runs
import numpy as np
import pytest
import torch
import yaml
from conftest import Train
from language_model import prepare
from language_model.model import Transformer
from run_results import summary
from torch import nn
from torch.nn import functional

from trainer.assembly import class_count
from trainer.config import load_config
from trainer.config_model import TaskConfig
from trainer.data.sampler import BatchPlan
from trainer.errors import BadSample, UserError
from trainer.memory.blocks import repeated_blocks
from trainer.memory.jobs import plan_job
from trainer.tasks import build_task
from trainer.tasks.language_model import IGNORED, LanguageModel

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(6, 5, 11, generator=GENERATOR)
TARGETS = torch.randint(0, 11, (6, 5), generator=GENERATOR)
TARGETS[0, :3] = TARGETS[4] = IGNORED
DATA = [torch.zeros(6, 5, dtype=torch.int64), TARGETS]


class Text:
    """What a data set may know of its tokens."""

    sequence_length = 5
    bytes_per_token = 4.0

    def decode(self, ids: Any) -> str:
        return "".join("abcdefghijk"[i] for i in ids)


def task(num_classes: int | None = 11) -> LanguageModel:
    built = build_task(TaskConfig(name="language_model"), num_classes)
    assert isinstance(built, LanguageModel)
    return built


def rows(data: list[torch.Tensor], chosen: slice) -> list[torch.Tensor]:
    return [part[chosen] for part in data]


def test_sums_over_pieces_make_the_mean_over_the_tokens_that_count() -> None:
    t = task()
    pieces = [slice(0, 1), slice(1, 4), slice(4, 5), slice(5, 6)]
    total = sum(t.loss_sum(LOGITS[p], rows(DATA, p)) for p in pieces)
    count = sum(t.loss_count(LOGITS[p], rows(DATA, p)) for p in pieces)
    assert count == 6 * 5 - 3 - 5
    torch.testing.assert_close(total / count, functional.cross_entropy(LOGITS.flatten(0, 1), TARGETS.flatten()))


def test_the_loss_is_in_float32() -> None:
    assert task().loss_sum(LOGITS.bfloat16(), DATA).dtype == torch.float32


def test_metrics() -> None:
    t = task()
    t.look_at(Text(), Text())
    assert t.tokens_per_sample == 5
    parts = [t.eval_sums(LOGITS[i::4], [part[i::4] for part in DATA]) for i in range(4)]
    found = t.metrics({k: float(sum(p[k] for p in parts)) for k in parts[0]})
    mean = functional.cross_entropy(LOGITS.flatten(0, 1), TARGETS.flatten()).item()
    right = (LOGITS.argmax(2) == TARGETS)[TARGETS != IGNORED].float().mean().item()
    expected = {"loss": mean, "perplexity": math.exp(mean), "token_accuracy": right}
    assert found == pytest.approx({**expected, "bits_per_byte": mean / math.log(2) / 4})
    assert (t.best_metric, t.best_mode) == ("loss", "min")
    t.look_at(Text(), None)
    assert "bits_per_byte" not in t.metrics({"loss": 1.0, "correct": 1.0, "tokens": 2.0})


def test_examples_show_the_token_that_surprises_most() -> None:
    t = task()
    assert t.examples(LOGITS, DATA, 3) == {}  # a data set without text
    t.look_at(Text(), Text())
    inputs = torch.arange(5).repeat(2, 1)
    targets = torch.full((2, 5), 9)
    targets[1] = IGNORED
    logits = torch.zeros(2, 5, 11)
    logits[0, 2, 7] = 5.0  # sure, and wrong
    examples = t.examples(logits, [inputs, targets], 2)
    ((target, prediction, confidence),) = t.describe_examples(examples, [])  # nothing of the second counts
    assert (target, prediction) == ("abc[j]", "[h]")
    assert confidence == pytest.approx(math.exp(5) / (math.exp(5) + 10))


def test_a_plan_copies_no_data_set(tmp_path: Path) -> None:
    class Locked(Text):
        def __init__(self) -> None:
            self.lock = threading.Lock()  # which cannot be copied, as files that are open

    t, plain = task(), tmp_path / "run.yaml"
    t.look_at(Text(), Locked())
    t.weights = nn.Linear(1, 1)  # type: ignore[attr-defined]
    plain.write_text(yaml.safe_dump(language_runs.config(tmp_path)))
    feed: Any = SimpleNamespace(example=lambda num: (DATA, 0), resident_bytes=0)
    batch = BatchPlan.split(6, 6, None, 1, False)
    with mock.patch.object(type(t), "to", autospec=True) as move:
        job = plan_job(load_config(str(plain)), nn.Linear(1, 1), t, feed, batch, "cpu")
    assert job.share == 6
    (moved, device), _ = move.call_args
    assert (device.type, moved.weights is t.weights) == ("cpu", False)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (
            torch.tensor([[0, 1], [2, 11]]),
            torch.zeros(2, 2, dtype=torch.int64),
            "sample 8 has the input 11 at position 1",
        ),
        (
            torch.zeros(2, 2, dtype=torch.int64),
            torch.tensor([[0, 1], [-7, 1]]),
            "sample 8 has the target -7 at position 0",
        ),
        (
            torch.full((2, 2), IGNORED),
            torch.zeros(2, 2, dtype=torch.int64),
            "sample 5 has the input -100 at position 0; the model's tokens are 0 to 10",
        ),
        (torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int64), "must be int64"),
        (torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), r"got \[2, 2\] and \[2\]"),
    ],
)
def test_batches_that_cannot_be_trained_on(inputs: Any, targets: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        task().check([inputs, targets], torch.tensor([5, 8]))


def test_bad_ids_are_bad_samples_so_that_their_file_is_named() -> None:
    with pytest.raises(BadSample) as raised:
        task().check([torch.full((2, 2), 11), torch.zeros(2, 2, dtype=torch.int64)], torch.tensor([5, 8]))
    assert (raised.value.sample, raised.value.what.partition(";")[0]) == (5, "has the input 11 at position 0")


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ({"transforms": {"train": [{"name": "RandomHorizontalFlip"}]}}, r"transforms\.train\.0"),
        ({"transforms": {"eval": [{"name": "torchvision.transforms.v2:CenterCrop"}]}}, r"transforms\.eval\.0"),
        ({"augment": {"mixup": 0.2}}, "augment"),
        ({"normalize": {"mean": [0.5], "std": [0.5]}}, "normalize"),
    ],
)
def test_what_is_for_pictures_is_refused(data: dict[str, Any], path: str, tmp_path: Path) -> None:
    config = language_runs.config(tmp_path)
    file = tmp_path / "run.yaml"
    for extra in ({"transforms": {"train": [{"name": "my_package:shuffled"}]}}, data):
        file.write_text(yaml.safe_dump(config | {"data": config["data"] | extra}))
        if extra is not data:
            task().check_config(load_config(str(file)))
    with pytest.raises(UserError, match=rf"^data\.{path}: .* for pictures, and inputs here are tokens"):
        task().check_config(load_config(str(file)))


def test_ignored_targets_are_no_mistake() -> None:
    task().check(DATA, torch.arange(6))


def test_a_vocabulary_must_be_known() -> None:
    with pytest.raises(UserError, match=r"set data\.train\.args\.vocab_size"):
        task(None)


@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 11), (6, 5, 10)])
def test_outputs_that_are_no_logits(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="expected logits"):
        task().forward(lambda inputs: torch.zeros(shape), DATA)  # type: ignore[arg-type]


def test_a_model_with_too_few_tokens_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(language_runs.config(tmp_path, model__args={"vocab_size": 100})))

    class Data:
        vocab_size = 256

    with pytest.raises(UserError, match=r"the model has 100 different tokens, data\.train has 256"):
        class_count(load_config(str(file)), Data())  # type: ignore[arg-type]


# ---- the example ---------------------------------------------------------------------------------------------------


def test_no_position_sees_what_comes_after_it() -> None:
    model = Transformer(11, width=16, depth=2, num_heads=2, max_length=8).eval()
    tokens = torch.randint(0, 11, (3, 8), generator=GENERATOR)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])
    torch.testing.assert_close(model(tokens[:, :3]), before[:, :3])


def test_the_order_of_the_tokens_before_matters() -> None:
    model = Transformer(11, width=16, depth=2, num_heads=2, max_length=8).eval()
    swapped = model(torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]]))
    assert not torch.allclose(swapped[0, -1], swapped[1, -1], atol=1e-6)


def test_embeddings_are_shared_where_asked_for() -> None:
    tied, free = Transformer(11, depth=1), Transformer(11, depth=1, tied=False)
    assert tied.head.weight is tied.embedding.weight
    assert free.head.weight is not free.embedding.weight


def test_its_blocks_are_found() -> None:
    assert list(repeated_blocks(Transformer(11, depth=3))) == ["blocks.0", "blocks.1", "blocks.2"]


def test_text_becomes_token_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\n<|end|>\nTwo,\nand more.\n<|end|>\nDrei: größer.")
    documents = list(prepare.read_documents([tmp_path], "<|end|>"))
    assert documents == ["One.\n", "Two,\nand more.\n", "Drei: größer."]
    prepare.write(documents, tmp_path / "out", eval_every=3)
    read = {name: np.fromfile(tmp_path / "out" / name, "uint16") for name in ("train.bin", "eval.bin")}
    assert bytes(read["train.bin"].astype("uint8")) == b"One.\n\0Two,\nand more.\n\0"
    assert bytes(read["eval.bin"].astype("uint8")).decode() == "Drei: größer.\0"
    known = json.loads((tmp_path / "out" / "tokens.json").read_text())
    assert known["num_bytes"] == {name: len(tokens) for name, tokens in read.items()}


def test_several_documents_on_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\nTwo,<|end|> three.<|end|>Four\nand<|end|>")
    assert list(prepare.read_documents([tmp_path], "<|end|>")) == ["One.\nTwo,", "three.", "Four\nand", ""]


def test_too_few_documents_leave_no_token_files(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="fewer than 10 documents"):
        prepare.write(["One.", "Two."], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_single_text_is_cut(tmp_path: Path) -> None:
    prepare.write(["0123456789" * 2], tmp_path)
    assert bytes(np.fromfile(tmp_path / "eval.bin", "uint16").astype("uint8")) == b"89\0"


def test_texts_longer_than_the_model_takes() -> None:
    model = Transformer(11, width=8, depth=1, num_heads=2, max_length=8)
    with pytest.raises(ValueError, match="9 tokens are more than max_length: 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))
    assert model(torch.zeros(1, 8, dtype=torch.int64)).shape == (1, 8, 11)


def test_loss_falls_on_real_text(train: Train, tmp_path: Path) -> None:
    """It is 5.5 by chance (256 bytes), and 3.1 for who knows how often each byte comes."""
    language_runs.documentation(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(language_runs.config(tmp_path)))
    assert train("--config", file).code == 0
    counts = np.bincount(np.fromfile(tmp_path / "train.bin", "uint16"), minlength=256) + 1
    tokens = np.fromfile(tmp_path / "eval.bin", "uint16")
    by_frequency = -np.log(counts / counts.sum())[tokens].mean()
    found = summary(tmp_path / "run")["metrics"]
    assert found["eval/loss"] < 2.85 < by_frequency
    assert found["eval/bits_per_byte"] == pytest.approx(found["eval/loss"] / math.log(2))
    (samples,) = (tmp_path / "run" / "eval").glob("*/samples.json")
    assert re.search(r"\w\[.*\]$", json.loads(samples.read_text())[0]["target"], re.DOTALL)
