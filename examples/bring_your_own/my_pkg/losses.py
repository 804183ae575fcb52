"""A loss of your own: a callable of (outputs, targets) that returns a mean, or one value per sample."""

import torch
from torch import nn
from torch.nn import functional


class Focal(nn.Module):
    """Focal loss (Lin et al., 2017, https://arxiv.org/abs/1708.02002) for single-label classification."""

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        log_p = functional.log_softmax(logits, dim=1).gather(1, labels.unsqueeze(1)).squeeze(1)
        return (-((1 - log_p.exp()) ** self.gamma) * log_p).mean()
