"""Small runs of the language example on real text, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from conftest import REPOSITORY
from language_model import prepare

LENGTH = 32


def documentation(folder: Path, num_modules: int = 40) -> None:
    """Writes token files of what the largest of Python's modules say of themselves."""
    library = Path(json.__file__).parent.parent
    files = sorted(library.glob("*.py"), key=lambda file: (-file.stat().st_size, file.name))[:num_modules]
    prepare.write(map(prepare.docstrings, files), folder)


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    """Returns the example's config with a smaller model and fewer steps; its text is in the folder."""
    run: dict[str, Any] = yaml.safe_load((REPOSITORY / "examples" / "language_model" / "stdlib.yaml").read_text())
    run["run"]["dir"] = str(folder / "run")
    for split in ("train", "eval"):
        run["data"][split]["args"] = {"path": str(folder / f"{split}.bin"), "sequence_length": LENGTH}
    run["model"]["args"] |= {"width": 64, "depth": 2, "max_length": LENGTH}
    run["optim"]["lr"] = 1e-2
    run["schedule"]["warmup"] = 10
    run["train"] = {"steps": 80, "batch_size": 32}
    run["eval"] = {"every": 80, "batch_size": 256}
    run["checkpoint"] = {"every": 80}
    for dotted, value in changes.items():
        section = run
        *parents, last = dotted.split("__")
        for parent in parents:
            section = section[parent]
        section[last] = section[last] | value if isinstance(value, dict) else value
    return run
