"""A compact decoder-only transformer: rotary positions, RMSNorm before each part, SwiGLU, no biases.

An ordinary module that knows nothing of Lockstep. As Llama (https://arxiv.org/abs/2302.13971). Initial weights have
a variance of 1 / width, divided by the number of residual branches where these end, as in GPT-2.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    """Causal self-attention with rotary positions (https://arxiv.org/abs/2104.09864)."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Returns (B, L, width) for x (B, L, width); cos and sin are (L, width of a head)."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        y = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class SwiGLU(nn.Module):
    """The gated part of a block (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_and_up = nn.Linear(width, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)
        return self.out(functional.silu(gate) * up)


class Block(nn.Module):
    """Attention and SwiGLU, each beside the residual stream."""

    def __init__(self, width: int, num_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, num_heads, dropout)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = SwiGLU(width, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Transformer(nn.Module):
    """Token ids (B, L), int64, to logits of the next token (B, L, vocab_size).

    Args:
        vocab_size: number of different tokens; a multiple of 64 is fastest on GPUs.
        width: of the residual stream.
        depth: number of blocks.
        num_heads: of attention; must divide `width` into heads of even width.
        hidden: width inside SwiGLU; default: 8/3 of `width`, which costs what a plain MLP of 4 does, up to a multiple
            of 64.
        max_length: longest sequence.
        dropout: share of what a block adds, and of attention, that is left out in training.
        tied: use the embedding's weights for the logits, too; with few tokens a model learns faster without.
        rope_base: of the slowest rotation.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self,
        vocab_size: int,
        width: int = 256,
        depth: int = 4,
        num_heads: int = 4,
        hidden: int | None = None,
        max_length: int = 1024,
        dropout: float = 0.0,
        tied: bool = True,
        rope_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        if width % num_heads or (width // num_heads) % 2:
            raise ValueError(f"{num_heads} heads do not divide a width of {width} into even parts")
        hidden = hidden or math.ceil(8 * width / 3 / 64) * 64
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, num_heads, hidden, dropout) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                is_residual = name.endswith("out.weight")
                nn.init.normal_(parameter, std=1 / math.sqrt(width * (2 * depth if is_residual else 1)))
        if tied:
            self.head.weight = self.embedding.weight
        cos, sin = rotations(max_length, width // num_heads, rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns logits; those at a position depend on the tokens up to it."""
        length = tokens.shape[1]
        if length > len(self.cos):
            raise ValueError(f"{length} tokens are more than max_length: {len(self.cos)}")
        x = self.embedding(tokens)
        cos, sin = self.cos[:length], self.sin[:length]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def rotations(length: int, width: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cosines and sines (length, width) of the angles that positions turn the pairs of a head by."""
    frequencies = base ** (-torch.arange(0, width, 2) / width)
    angles = torch.outer(torch.arange(length), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (i, i + width / 2) of each head; x is (B, heads, L, width)."""
    first, second = x.chunk(2, dim=-1)
    turned = x * cos + torch.cat((-second, first), dim=-1) * sin
    return turned.to(x.dtype)  # in half precision, too
