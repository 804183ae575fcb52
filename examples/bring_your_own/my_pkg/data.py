"""A data set of your own: anything with `__len__` and `__getitem__`."""

import torch


class Shapes:
    """Noisy 16x16 drawings of a disc, a square or a cross at a random place; items are (image, label).

    The randomness is torch's global generator, as in most people's code. Lockstep seeds it for every sample,
    so that a drawing depends on (seed, epoch, index) and not on the worker, rank or restart that makes it.
    """

    classes = ["disc", "square", "cross"]

    def __init__(self, length: int, noise: float = 0.2) -> None:
        self.length = length
        self.noise = noise

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        label = index % 3
        center = 4 + 8 * torch.rand(2)
        radius = 2.5 + 1.5 * torch.rand(())
        y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
        dy, dx = (y - center[0]).abs(), (x - center[1]).abs()
        if label == 0:
            shape = dx**2 + dy**2 <= radius**2
        elif label == 1:
            shape = torch.maximum(dx, dy) <= 0.9 * radius
        else:
            shape = (torch.minimum(dx, dy) <= 0.8) & (torch.maximum(dx, dy) <= radius)
        return (shape.float() + self.noise * torch.randn(16, 16)).unsqueeze(0), label
