"""Predicts the next byte from the last eight: embeddings, group norm, layer norm, three blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BYTES = 256
CONTEXT = 8
NOTHING = BYTES  # stands for what is before a sequence's beginning


class Block(nn.Module):
    """y = x + linear(gelu(layer_norm(linear(x))))"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Linear(width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(2 * width)
        self.act = nn.GELU()
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(self.act(self.norm(self.wide(x))))


class BytePredictor(nn.Module):
    """tokens, positions (*) -> (*, 256) logits of the byte after each; 350 thousand parameters.

    ``positions`` count from 0 in each sequence, so sequences may lie end to end: a byte sees none
    of the sequence before its own.
    """

    def __init__(self, width: int = 128, embedding: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES + 1, embedding)
        self.stem = nn.Sequential(
            nn.Linear(CONTEXT * embedding, width, bias=False), nn.GroupNorm(8, width), nn.SiLU()
        )
        self.blocks = nn.Sequential(Block(width), Block(width), Block(width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        flat, before = tokens.reshape(-1), positions.reshape(-1)
        context = [torch.where(before >= back, flat.roll(back), NOTHING) for back in range(CONTEXT)]
        x = self.embedding(torch.stack(context, dim=1)).flatten(1)
        x = self.norm(self.blocks(self.stem(x)))
        return self.head(x).view(*tokens.shape, BYTES)
