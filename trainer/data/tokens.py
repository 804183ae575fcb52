"""Text as files of token ids, memory-mapped: what a language model trains on.

Owns the files, and what is known of them beside their tokens. Making them is `examples/language_model/prepare.py`; what
a batch of them means, `trainer.tasks.language_model`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.errors import BadSample, UserError, one_line

SIDE_FILE = "tokens.json"
_RAW_TYPES = ("uint16", "uint32")
_BYTES = "bytes"


class TokenFile:
    """Token ids in files, as nanoGPT writes them, cut into sequences of equal length.

    Item i is (tokens[i*L : i*L + L], the same moved on by one), both int64 (L,): the target of each token is the next.
    Of several files each is cut by itself, one after the other; what is left at the end of a file is not used.

    A file `tokens.json` beside the first file may say what is not in the tokens themselves, with keys that all may be
    missing: `vocab_size`; `dtype` of raw files; `num_bytes`, by file name, of the text that became its tokens; and
    `decoder`: `bytes` where a token is a byte, else the folder of a tokenizer of transformers, relative to it.

    Args:
        path: a raw file of uint16 or uint32, or a .npy file with one dimension; or a list of them.
        sequence_length: tokens per sample, L.
        dtype: of raw files, `uint16` or `uint32`; default: what the side file says, else `uint16`.
        vocab_size: number of different tokens; default: what the side file says.

    Raises:
        UserError: a file is missing, or holds no token ids, or fewer than a sample.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        sequence_length: int,
        dtype: str | None = None,
        vocab_size: int | None = None,
    ) -> None:
        for name, value in (("sequence_length", sequence_length), ("vocab_size", vocab_size)):
            is_size = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if not is_size and (value is not None or name == "sequence_length"):
                raise UserError(f"{name} must be a positive whole number (got {value!r})")
        paths = [path] if isinstance(path, str) else list(path)
        if not paths:
            raise UserError("path names no file")
        self.files = [Path(name).expanduser() for name in paths]
        known = _read_side_file(self.files[0].parent / SIDE_FILE)
        if dtype is not None and all(file.suffix == ".npy" for file in self.files):
            raise UserError("a .npy file says itself of which type it is: dtype has no effect")
        self._dtype = dtype or known.get("dtype", "uint16")
        if self._dtype not in _RAW_TYPES:
            raise UserError(f"dtype must be {' or '.join(_RAW_TYPES)} (got {self._dtype!r})")
        self.sequence_length = sequence_length
        self.vocab_size: int | None = vocab_size or known.get("vocab_size")
        self._tokens: list[NDArray[Any]] | None = [_map(file, self._dtype) for file in self.files]
        lengths = [len(tokens) for tokens in self._tokens]
        self._ends = np.cumsum([(length - 1) // sequence_length for length in lengths])  # of the samples of each file
        if not self._ends[-1]:
            has = f"{max(lengths):,} tokens" if len(lengths) == 1 else f"at most {max(lengths):,} tokens"
            message = f"'{self.files[0]}' has {has}, and a sample takes sequence_length + 1 = {sequence_length + 1:,}"
            raise UserError(message)
        num_bytes = [known.get("num_bytes", {}).get(file.name) for file in self.files]
        self.bytes_per_token: float | None = None if None in num_bytes else sum(num_bytes) / sum(lengths)
        """Bytes of text per token, in the mean over the files, where the side file knows it."""
        self._decoder: str | None = known.get("decoder")
        self._tokenizer: Any = None

    @property
    def decodes(self) -> bool:
        """Whether tokens can be turned back into text."""
        return self._decoder is not None

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids.

        Raises:
            UserError: the tokenizer cannot be read.
        """
        assert self._decoder is not None
        if self._decoder == _BYTES:
            # A model may know more tokens than there are bytes.
            return bytes(token for token in ids if token < 256).decode("utf-8", errors="replace")
        if self._tokenizer is None:
            folder = self.files[0].parent / self._decoder
            try:
                from transformers import AutoTokenizer

                self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            except ModuleNotFoundError as error:
                raise UserError(
                    "its tokenizer needs transformers: pip install 'lockstep-trainer[huggingface]'"
                ) from error
            except Exception as error:  # transformers raises many types for what it cannot read
                raise UserError(f"cannot read the tokenizer '{folder}': {one_line(error)}") from error
        return str(self._tokenizer.decode(list(ids)))

    def source_name(self, index: int) -> str:
        """Returns the file of a sample, for messages."""
        return str(self.files[self._place(index)[0]])

    def _place(self, index: int) -> tuple[int, int]:
        """Returns the file of a sample, and the position of its first token there."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[number - 1]) if number else 0
        return number, (index - first) * self.sequence_length

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self._tokens is None:
            self._tokens = [_map(file, self._dtype) for file in self.files]
        number, start = self._place(index)
        stored = self._tokens[number][start : start + self.sequence_length + 1]
        tokens = stored.astype(np.int64)
        if stored.dtype == np.uint64 and tokens.min() < 0:
            raise BadSample(f"has the token {stored.max()}, which no model knows", index)
        return torch.from_numpy(tokens[:-1]), torch.from_numpy(tokens[1:])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_tokens": None}  # a memory map is pickled with all that it maps


def _map(file: Path, dtype: str) -> NDArray[Any]:
    """Maps the tokens of a file.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    if not file.is_file():
        raise UserError(f"no such file: '{file}'")
    try:
        if file.suffix == ".npy":
            tokens = np.load(file, mmap_mode="r", allow_pickle=False)
        else:
            size, item_size = file.stat().st_size, np.dtype(dtype).itemsize
            if size % item_size:
                raise UserError(f"'{file}' has {size:,} bytes, which are no whole number of {dtype}: set dtype")
            # A file of no bytes cannot be mapped.
            tokens = np.memmap(file, np.dtype(dtype).newbyteorder("<"), "r") if size else np.zeros(0, dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read '{file}': {one_line(error)}") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        raise UserError(f"'{file}' holds {tokens.dtype} {list(tokens.shape)}, not token ids in one dimension")
    if not len(tokens):
        raise UserError(f"'{file}' is empty")
    return tokens


def _read_side_file(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read '{file}': {one_line(error)}") from None
    kinds = {"vocab_size": int, "dtype": str, "num_bytes": dict, "decoder": str}
    if not isinstance(known, dict):
        raise UserError(f"'{file}' must hold a JSON object")
    for key, value in known.items():
        if key not in kinds or not isinstance(value, kinds[key]):
            raise UserError(f"'{file}': '{key}' is not one of {', '.join(kinds)}, or is of another type")
    return known
