"""What a person writes by hand for the digits: the peer of `benchmarks.startup`, with our third-party imports."""

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import accelerate
import fsspec  # noqa: F401
import numpy as np
import psutil  # noqa: F401
import pydantic  # noqa: F401
import safetensors  # noqa: F401
import torch
import tqdm  # noqa: F401
import xxhash  # noqa: F401
import yaml  # noqa: F401
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchvision.transforms import v2

BATCH_SIZE = 96


def main() -> None:
    """Trains two steps."""
    accelerator = accelerate.Accelerator()
    package = find_spec("sklearn")  # of which ours reads this file only, too
    assert package is not None
    assert package.submodule_search_locations is not None
    table = np.loadtxt(Path(package.submodule_search_locations[0]) / "datasets/data/digits.csv.gz", delimiter=",")
    images = torch.from_numpy(table[:, :-1].astype(np.float32) / 16).view(-1, 1, 8, 8)
    dataset = TensorDataset(images, torch.from_numpy(table[:, -1].astype(np.int64)))
    crop = v2.RandomAffine(10, translate=(0.1, 0.1))
    widths = (1, 32, 64, 64)
    blocks: list[nn.Module] = []
    for before, after in pairwise(widths):
        blocks += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(
        dataset, accelerator.num_processes, accelerator.process_index
    )
    loader = DataLoader(dataset, batch_size=BATCH_SIZE // accelerator.num_processes, sampler=sampler)
    for step, (batch, targets) in zip(range(1, 3), loader, strict=False):
        images, targets = crop(batch).to(accelerator.device), targets.to(accelerator.device)
        loss = nn.functional.cross_entropy(model(images), targets)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step}/2  loss {loss.item():.4f}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
