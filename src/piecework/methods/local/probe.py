"""The gradient that backpropagation would give each block, to compare with what the block steps along."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...losses import Loss
from ...training import Batch
from ..blocks import Block
from .heads import Site
from .links import Links


def true_gradients(
    blocks: Sequence[Block],
    links: Links,
    sites: Sequence[Site],
    batch: Batch,
    objective: Loss,
    step: int,
    learning: Sequence[bool],
) -> dict[int, list[Tensor]]:
    """By the number of a block of this rank, the gradient of the deployed network's mean loss; nothing moves.

    Blocks see the noise of this step. Each is evaluated twice, so that one graph is alive at a time. Collective."""
    inputs: dict[int, Tensor] = {}
    h, last = batch.x, len(sites) - 1
    if blocks[0].number > 0:
        h = links.from_below(sites[blocks[0].number - 1].h, len(batch), step)
    for block in blocks:
        inputs[block.number] = h
        block.begin(step, again=True)
        with torch.no_grad():
            h = block(h).contiguous()
    if blocks[-1].number < last:
        links.up(h)
        cotangent = links.from_above(h)
    else:
        with torch.enable_grad():
            outputs = h.detach().requires_grad_()
            cotangent = torch.autograd.grad(objective(outputs, batch.y), outputs)[0]
    found: dict[int, list[Tensor]] = {}
    for block in reversed(blocks):
        gradients, cotangent = _through(block, inputs.pop(block.number), cotangent, below=block.number > 0)
        if learning[block.number]:
            found[block.number] = gradients
    if blocks[0].number > 0:
        links.down(cotangent, step)
    return found


def _through(block: Block, x: Tensor, cotangent: Tensor, *, below: bool) -> tuple[list[Tensor], Tensor]:
    """(gradient of the parameters, derivative at the input): zeros where nothing reaches them."""
    leaf = x.detach()
    if below and leaf.is_floating_point():
        leaf.requires_grad_()
    with torch.enable_grad():
        out = block(leaf)
    wanted = [*block.parameters, *([leaf] if leaf.requires_grad else [])]
    if not wanted or not out.requires_grad:
        return [torch.zeros_like(one) for one in block.parameters], torch.zeros_like(x)
    found = torch.autograd.grad(out, wanted, cotangent, allow_unused=True)
    gradients = [torch.zeros_like(one) if g is None else g for one, g in zip(wanted, found, strict=True)]
    if leaf.requires_grad:
        return gradients[:-1], gradients[-1].contiguous()
    return gradients, cotangent
