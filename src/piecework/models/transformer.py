"""A small causal transformer for sequences of tokens, as a row of blocks that can be cut anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..training import BadInput
from .filling import filled

_STD = 0.02


class Embedding(nn.Module):
    """Tokens (n, T), whole numbers of any dtype, to vectors (n, T, width): one for the token and one for its place."""

    def __init__(self, vocabulary: int, width: int, context: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.empty(context, width))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.tokens(x.long()) + self.places[: x.shape[1]]
        return h


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), for (n, T, width); a token sees itself and those before it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.projections = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        rate = self.dropout if self.training else 0.0
        x = x + F.dropout(self.out(self._attention(self.first(x), rate)), rate, self.training)
        return x + F.dropout(self.mlp(self.second(x)), rate, self.training)

    def _attention(self, x: Tensor, rate: float) -> Tensor:
        n, tokens, width = x.shape
        shape = (n, tokens, self.heads, width // self.heads)
        q, k, v = (one.view(shape).transpose(1, 2) for one in self.projections(x).chunk(3, dim=2))
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        return mixed.transpose(1, 2).reshape(n, tokens, width)


def transformer(
    vocabulary: int,
    *,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    context: int = 128,
    dropout: float = 0.0,
    tied: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """A causal language model: tokens (n, T) with T <= context to outputs (n, T, vocabulary), which are what follows.

    An `nn.Sequential` of `Embedding`, `depth` times `TransformerBlock`, a normalisation and a linear layer without
    bias.
    tied: the last matrix is that of the embedding; such a model can only be cut where both stay in one block.

    Weights are normal with standard deviation 0.02, those of the last layers before a sum divided by sqrt(2 depth);
    biases are 0 (Radford et al. 2019). Only `seed` decides them. Raises BadInput for sizes that do not fit."""
    if min(vocabulary, width, depth, heads, context) < 1 or width % heads:
        raise BadInput(
            f"a transformer needs sizes of at least 1 and a width that its heads divide, got vocabulary {vocabulary}, "
            f"width {width}, depth {depth}, heads {heads}, context {context}"
        )
    if not 0 <= dropout < 1:
        raise BadInput(f"dropout must be in [0, 1), got {dropout}")

    def make() -> nn.Sequential:
        blocks = [TransformerBlock(width, heads, dropout) for _ in range(depth)]
        ends = [nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)]
        return nn.Sequential(Embedding(vocabulary, width, context), *blocks, *ends)

    def std(name: str, _: Tensor) -> float:
        before_a_sum = name.endswith(("out.weight", "mlp.2.weight"))
        return _STD / math.sqrt(2 * depth) if before_a_sum else _STD

    model = filled(make, std, seed).to(dtype)
    if tied:
        last, first = model[-1], model[0]
        assert isinstance(last, nn.Linear)
        assert isinstance(first, Embedding)
        last.weight = first.tokens.weight
    return model


def transformer_of(
    context: int, widths: Sequence[int], vocabulary: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> nn.Sequential:
    """The transformer that the command line makes of `--hidden`: a block for each width, a head for every 32 units."""
    width = widths[0]
    heads = next(number for number in range(max(1, width // 32), 0, -1) if width % number == 0)
    depth = len(widths)
    return transformer(vocabulary, width=width, depth=depth, heads=heads, context=context, seed=seed, dtype=dtype)
