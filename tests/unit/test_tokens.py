"""Token files: what their samples are, and what is said of files that hold something else."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import nightly
from language_model import prepare

from trainer.data.tokens import TokenFile
from trainer.errors import BadSample, UserError


def raw(file: Path, tokens: Any, dtype: str = "uint16") -> str:
    np.asarray(tokens, dtype=dtype).tofile(file)
    return str(file)


def known(folder: Path, **values: Any) -> None:
    (folder / "tokens.json").write_text(json.dumps(values))


def test_samples_follow_one_another_and_targets_are_the_next_tokens(tmp_path: Path) -> None:
    tokens = TokenFile(raw(tmp_path / "a.bin", range(100, 112)), sequence_length=4)
    assert len(tokens) == 2  # a third would have no target for its last token
    for i, (inputs, targets) in enumerate(tokens[i] for i in range(2)):
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.tolist() == list(range(100 + 4 * i, 104 + 4 * i))
        assert targets.tolist() == list(range(101 + 4 * i, 105 + 4 * i))
    with pytest.raises(IndexError):
        tokens[2]


def test_the_last_target_may_be_the_last_token(tmp_path: Path) -> None:
    assert len(TokenFile(raw(tmp_path / "a.bin", range(9)), sequence_length=4)) == 2


def test_no_sample_crosses_from_one_file_into_the_next(tmp_path: Path) -> None:
    files = [raw(tmp_path / f"{i}.bin", np.arange(length) + 100 * i) for i, length in enumerate([9, 3, 6])]
    tokens = TokenFile(files, sequence_length=4)
    assert [tokens[i][0][0].item() for i in range(len(tokens))] == [0, 4, 200]  # the second has too few for one
    assert tokens.source_name(1) == files[0]
    assert tokens.source_name(2) == files[2]


def test_ids_beyond_all_that_torch_counts_are_told_as_they_are(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([1, 2, 3, 4, 5, 2**64 - 1], np.uint64))
    assert TokenFile(str(tmp_path / "a.npy"), 4)[0][1].tolist() == [2, 3, 4, 5]
    with pytest.raises(BadSample, match="sample 0 has the token 18446744073709551615"):
        TokenFile(str(tmp_path / "a.npy"), 5)[0]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_types(dtype: str, tmp_path: Path) -> None:
    largest = np.iinfo(dtype).max
    file = raw(tmp_path / "a.bin", [largest] * 5, dtype)
    assert TokenFile(file, 4, dtype=dtype)[0][0].tolist() == [largest] * 4
    known(tmp_path, dtype=dtype)
    assert TokenFile(file, 4)[0][1].tolist() == [largest] * 4
    np.save(tmp_path / "a.npy", np.full(5, largest, dtype))
    assert TokenFile(str(tmp_path / "a.npy"), 4)[0][0].tolist() == [largest] * 4


def test_it_travels_to_workers_without_its_tokens(tmp_path: Path) -> None:
    tokens = TokenFile(raw(tmp_path / "a.bin", np.zeros(100_000)), sequence_length=4)
    sent = pickle.dumps(tokens)
    assert len(sent) < 2000
    assert torch.equal(pickle.loads(sent)[7][0], tokens[7][0])


def test_what_the_side_file_knows(tmp_path: Path) -> None:
    text = "Übung macht den Meister"
    file = raw(tmp_path / "a.bin", list(text.encode()))
    assert TokenFile(file, 4).vocab_size is None
    assert TokenFile(file, 4).bytes_per_token is None
    assert not TokenFile(file, 4).decodes
    known(tmp_path, vocab_size=256, decoder="bytes", num_bytes={"a.bin": 48})
    tokens = TokenFile(file, 4)
    assert tokens.vocab_size == 256
    assert tokens.bytes_per_token == 2.0
    assert tokens.decode([*text.encode(), 300]) == text  # of a model that knows more tokens than there are bytes
    assert TokenFile(file, 4, vocab_size=320).vocab_size == 320


@nightly
def test_a_tokenizer_of_transformers(tmp_path: Path) -> None:
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<end>": 0, "one": 1, "two": 2}, unk_token="<end>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    fast.save_pretrained(tmp_path / "saved")
    prepare.write(["one two", "two two one", "two one"], tmp_path, str(tmp_path / "saved"), eval_every=2)
    tokens = TokenFile(str(tmp_path / "train.bin"), 5)
    assert tokens.vocab_size == 3
    assert [t.tolist() for t in tokens[0]] == [[1, 2, 0, 2, 1], [2, 0, 2, 1, 0]]
    assert tokens.decode([1, 2]) == "one two"
    assert tokens.bytes_per_token == 16 / 6
    known(tmp_path, decoder="nowhere")
    with pytest.raises(UserError, match=r"cannot read the tokenizer '.*nowhere'"):
        TokenFile(str(tmp_path / "train.bin"), 4).decode([1])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"path": "none.bin"}, "no such file: 'none.bin'"),
        ({"path": []}, "names no file"),
        ({"path": "empty.bin"}, "'empty.bin' is empty"),
        ({"path": "short.bin"}, r"has 4 tokens, and a sample takes sequence_length \+ 1 = 5"),
        ({"path": ["short.bin", "short.bin"]}, "has at most 4 tokens"),
        ({"path": "odd.bin"}, "has 9 bytes, which are no whole number of uint16: set dtype"),
        ({"path": "short.bin", "dtype": "float32"}, "dtype must be uint16 or uint32"),
        ({"path": "table.npy"}, r"holds float64 \[3, 5\], not token ids in one dimension"),
        ({"path": "ids.npy", "dtype": "uint32"}, "dtype has no effect"),
        ({"path": "text.npy"}, "cannot read 'text.npy'"),
        ({"path": "short.bin", "sequence_length": 0}, "sequence_length must be a positive whole number"),
        ({"path": "short.bin", "vocab_size": 2.5}, "vocab_size must be a positive whole number"),
        ({"path": "wrong/a.bin"}, "'vocab' is not one of vocab_size"),
        ({"path": "torn/a.bin"}, "cannot read 'torn/tokens.json'"),
    ],
)
def test_what_is_refused(args: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    raw(Path("empty.bin"), [])
    raw(Path("short.bin"), range(4))
    Path("odd.bin").write_bytes(b"123456789")
    np.save("table.npy", np.zeros((3, 5)))
    np.save("ids.npy", np.arange(9))
    Path("text.npy").write_text("no array")
    for folder, text in (("wrong", '{"vocab": 3}'), ("torn", "{")):
        Path(folder).mkdir()
        raw(Path(folder, "a.bin"), range(9))
        Path(folder, "tokens.json").write_text(text)
    with pytest.raises(UserError, match=message):
        TokenFile(**{"sequence_length": 4, **args})
