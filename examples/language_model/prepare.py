"""Text -> files of token ids: train.bin, eval.bin and tokens.json, for the data set `token_file`.

    python prepare.py --stdlib --output data/stdlib
    python prepare.py stories.txt --separator '<|endoftext|>' --tokenizer gpt2 --output data/stories

A token is a byte unless a tokenizer is named.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

TEXT_ENDINGS = (".txt", ".md", ".rst")
END = 0  # a byte that no text has, after each document
BATCH = 1000  # documents that a tokenizer gets at once


def read_documents(paths: Iterable[Path], separator: str | None) -> Iterator[str]:
    """Yields the documents of files and of folders' text files: each file is one, or several by a separator's lines."""
    for path in paths:
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in TEXT_ENDINGS)
        if not files:
            raise SystemExit(f"no text in '{path}'")
        for file in files:
            if separator is None:
                yield file.read_text(encoding="utf-8", errors="replace")
                continue
            lines: list[str] = []
            with open(file, encoding="utf-8", errors="replace") as stream:
                for line in stream:
                    rest, *others = line.split(separator)
                    lines.append(rest)
                    for other in others:
                        yield "".join(lines)
                        lines = [other.lstrip()]
            yield "".join(lines)


def docstrings(file: Path) -> str:
    """Returns all docstrings of a Python file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text)


def standard_library() -> Iterator[str]:
    """Yields the docstrings of each module of Python's standard library, without its tests."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(folder.rglob("*.py")):
        inside = file.relative_to(folder).parts
        if not {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"} & set(inside):
            yield docstrings(file)


class Tokenizer:
    """Bytes, or a tokenizer of transformers by name or folder."""

    def __init__(self, name: str | None, folder: Path) -> None:
        self.decoder = "bytes"
        self.vocab_size, self.dtype = 256, "uint16"
        self._tokenizer: Any = None
        if name is None:
            return
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(name)
        self.decoder = "tokenizer"
        self._tokenizer.save_pretrained(folder / self.decoder)
        self.vocab_size = len(self._tokenizer)
        self.dtype = "uint16" if self.vocab_size <= 2**16 else "uint32"

    def __call__(self, documents: list[str]) -> list[list[int]]:
        """Returns the tokens of each document and the one that ends it."""
        if self._tokenizer is None:
            return [[*document.encode(), END] for document in documents]
        end = self._tokenizer.eos_token_id
        return [[*ids, end] for ids in self._tokenizer(documents, add_special_tokens=False)["input_ids"]]


class Writer:
    """A file of token ids that grows."""

    def __init__(self, file: Path, tokenizer: Tokenizer) -> None:
        self.num_bytes = 0
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._stream = open(file, "wb")  # noqa: SIM115
        self._waiting: list[str] = []

    def add(self, document: str) -> None:
        self._waiting.append(document)
        if len(self._waiting) == BATCH:
            self.flush()

    def flush(self) -> None:
        for document, ids in zip(self._waiting, self._tokenizer(self._waiting), strict=True):
            self._stream.write(np.array(ids, dtype=self._tokenizer.dtype).tobytes())
            self.num_bytes += len(document.encode()) + 1  # the end of a document counts as one
            self.num_tokens += len(ids)
        self._waiting = []

    def close(self) -> None:
        self.flush()
        self._stream.close()


def write(documents: Iterable[str], folder: Path, tokenizer_name: str | None = None, eval_every: int = 10) -> None:
    """Writes the token files of documents; every tenth one is for evaluation, or the last tenth of a single one."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(tokenizer_name, folder)
    writers = {name: Writer(folder / name, tokenizer) for name in ("train.bin", "eval.bin")}
    filled = (document for document in documents if document.strip())
    first_two = list(itertools.islice(filled, 2))
    if not first_two:
        raise SystemExit("there is no text")
    if len(first_two) == 1:
        (text,) = first_two
        cut = len(text) * (eval_every - 1) // eval_every
        writers["train.bin"].add(text[:cut])
        writers["eval.bin"].add(text[cut:])
    for i, document in enumerate(itertools.chain(first_two if len(first_two) == 2 else (), filled)):
        writers["eval.bin" if i % eval_every == eval_every - 1 else "train.bin"].add(document)
    known: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "dtype": tokenizer.dtype, "decoder": tokenizer.decoder}
    for writer in writers.values():
        writer.close()
    if not writers["eval.bin"].num_tokens:
        for name in writers:
            (folder / name).unlink()
        raise SystemExit(f"there are fewer than {eval_every} documents: give more, or a smaller --eval-every")
    known["num_bytes"] = {name: writer.num_bytes for name, writer in writers.items()}
    (folder / "tokens.json").write_text(json.dumps(known, indent=1), encoding="utf-8")
    for name, writer in writers.items():
        sys.stdout.write(f"{folder / name}: {writer.num_tokens:,} tokens of {writer.num_bytes:,} bytes of text\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="text files, or folders of .txt, .md and .rst files")
    parser.add_argument("--stdlib", action="store_true", help="the docstrings of Python's standard library")
    parser.add_argument("--output", type=Path, required=True, help="folder for the token files")
    parser.add_argument("--separator", help="what ends a document within a file, such as '<|endoftext|>'")
    parser.add_argument("--tokenizer", help="of transformers, by name or folder; default: a token is a byte")
    parser.add_argument("--eval-every", type=int, default=10, help="every so-many-th document is for evaluation")
    options = parser.parse_args()
    if options.stdlib == bool(options.paths):
        parser.error("name text files or folders, or say --stdlib")
    if options.eval_every < 2:
        parser.error("--eval-every must be at least 2")
    documents: Callable[[], Iterator[str]] = standard_library
    if options.paths:
        missing = [path for path in options.paths if not path.exists()]
        if missing:
            parser.error(f"no such file or folder: '{missing[0]}'")
        documents = lambda: read_documents(options.paths, options.separator)  # noqa: E731
    write(documents(), options.output, options.tokenizer, options.eval_every)


if __name__ == "__main__":
    main()
