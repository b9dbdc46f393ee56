"""What a step keeps in memory: block-ADMM, plain backpropagation, checkpointing: `python benchmarks/block_memory.py`.

Eight equal blocks of four layers each (linear, tanh), whose activations are far larger than their weights. Counted is
what autograd saves for its backward pass (`torch.autograd.graph.saved_tensors_hooks`), each storage once, parameters
left out, and with block-ADMM also the variables between its blocks; the most that was alive at any time of a step.
Gradients and optimisers are the same for all and are left out.
"""

from __future__ import annotations

import argparse
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

import report
from piecework import Batch, BlockADMM, losses
from piecework.methods.block_admm.variable import Cut

BLOCKS, LAYERS = 8, 4


class _Saved:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Peak:
    """The most bytes that were saved, with the variables of cuts, at once."""

    def __init__(self, model: nn.Module) -> None:
        self._left_out = {one.untyped_storage().data_ptr() for one in model.parameters()}
        self._alive: weakref.WeakSet[_Saved] = weakref.WeakSet()
        self.bytes = 0

    def look(self) -> None:
        cuts = [one for one in gc.get_objects() if type(one) is Cut]
        tensors = [one.tensor for one in self._alive]
        tensors += [value for cut in cuts for value in vars(cut).values() if isinstance(value, Tensor)]
        sizes = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
        self.bytes = max(self.bytes, sum(size for where, size in sizes.items() if where not in self._left_out))

    def pack(self, tensor: Tensor) -> _Saved:
        kept = _Saved(tensor.detach())
        self._alive.add(kept)
        self.look()
        return kept


@contextmanager
def counted(model: nn.Module) -> Iterator[Peak]:
    peak = Peak(model)
    with torch.autograd.graph.saved_tensors_hooks(peak.pack, lambda kept: kept.tensor):
        yield peak


def network(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(width, width), nn.Tanh())))
        for _ in range(BLOCKS)
    ]
    return nn.Sequential(*blocks)


def backpropagation(model: nn.Sequential, batch: Batch, forward: Callable[[Tensor], Tensor]) -> int:
    optimizer = torch.optim.Adam(model.parameters())
    with counted(model) as peak:
        loss = losses.Softmax()(forward(batch.x), batch.y)
        loss.backward()
    optimizer.step()
    return peak.bytes


def block_admm(model: nn.Sequential, batch: Batch, **settings: Any) -> int:
    starts = tuple(range(2 * LAYERS, 2 * LAYERS * BLOCKS, 2 * LAYERS))
    training = BlockADMM(at=starts, recompute=True, probe_every=0, **settings).bind(model, losses.Softmax())
    with counted(model) as peak:
        training.step(batch)
    return peak.bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8192)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    width, rows = arguments.width, arguments.rows
    batch = Batch(torch.randn(rows, width), torch.randint(width, (rows,)), torch.arange(rows))
    weights = sum(one.numel() * 4 for one in network(width).parameters())

    def run(kind: Callable[[nn.Sequential], int]) -> int:
        return kind(network(width))

    found = {
        "backpropagation": run(lambda model: backpropagation(model, batch, model)),
        f"backpropagation, checkpoints at the {BLOCKS} blocks": run(
            lambda model: backpropagation(
                model, batch, lambda x: checkpoint_sequential(model, BLOCKS, x, use_reentrant=False)
            )
        ),
        "block-admm --recompute, alpha beta = 1, one sweep of one step: backpropagation": run(
            lambda model: block_admm(model, batch)
        ),
        "block-admm --recompute --alpha-beta 0.5": run(lambda model: block_admm(model, batch, alpha_beta=0.5)),
        "block-admm --recompute --local-steps 2": run(lambda model: block_admm(model, batch, local_steps=2)),
        "block-admm --recompute --sweeps 3": run(lambda model: block_admm(model, batch, sweeps=3)),
        "block-admm --recompute --sweeps 3 --dual-step 0.5": run(
            lambda model: block_admm(model, batch, sweeps=3, dual_step=0.5)
        ),
    }
    plain = found["backpropagation"]
    rows_ = [[name, size / 2**20, size / plain] for name, size in found.items()]
    text = (
        f"{BLOCKS} blocks of {LAYERS} layers of width {width}, {rows} rows, float32: the activations that plain "
        f"backpropagation saves are {plain / weights:.0f} times the weights."
    )
    report.write("block-memory", "Memory of a step", [(text, ["method", "MiB at most", "part of plain"], rows_)])


if __name__ == "__main__":
    main()
