"""The global random generators of torch, numpy and Python: seeding them, and their state as tensors."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seeds the global generators of torch (all devices), numpy and random."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Returns the state of this rank's global generators, always of the same shapes."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, python_gauss = random.getstate()
    assert version == 3, "Python's generator has a new kind of state"
    python = [float(python_gauss is not None), python_gauss if python_gauss is not None else 0.0]
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "python": torch.tensor(internal, dtype=torch.int64),
        "scalars": torch.tensor([float(position), float(has_gauss), float(gauss), *python], dtype=torch.float64),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Sets this rank's global generators to what `generator_states` returned."""
    torch.set_rng_state(states["torch"])
    position, has_gauss, gauss, has_python_gauss, python_gauss = states["scalars"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    random.setstate((3, tuple(states["python"].tolist()), python_gauss if has_python_gauss else None))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
