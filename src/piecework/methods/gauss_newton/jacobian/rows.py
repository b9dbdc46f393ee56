"""Rows of the Jacobian for parameters without factors, sample by sample: bare parameters, operators, other layers.

`vmap` runs torch.func over the samples of a chunk: one pass for all rows, whatever the forward does with torch.func
itself. `single` takes one sample at a time by autograd, for models that vmap cannot follow (torch.autograd.grad inside,
control flow that depends on data): about n forward passes of a batch of one.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

RowsBy = Literal["vmap", "single"]

CHUNK_BYTES = 2**28
"""What the rows of one chunk may take while they are made; the intermediate values of the model come on top."""

_COPIES = 4
"""Rows are held about that many times while a chunk is made: a tensor each parameter, their join, and its place."""


def sample_rows(
    model: nn.Module,
    names: Sequence[str],
    x: Tensor,
    seeds: Tensor | None,
    *,
    num_outputs: int,
    by: RowsBy,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """z (n, k) and the rows (n, C, P_l) of the named parameters, laid out one after the other.

    x: (n, ...); seeds: (n, C, k), the columns of each sample's curvature root; None for unit vectors, C = k;
    num_outputs: k; chunk_bytes: bounds the samples that vmap takes at once, one at least."""
    parameters = {name: model.get_parameter(name) for name in names}
    if by == "single":
        return _by_single(model, parameters, x, seeds)
    return _by_vmap(model, parameters, x, seeds, num_outputs, chunk_bytes)


def _by_vmap(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    x: Tensor,
    seeds: Tensor | None,
    num_outputs: int,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor]:
    held = {name: parameter.detach() for name, parameter in parameters.items()}

    def of_one(x_i: Tensor, seeds_i: Tensor | None) -> tuple[Tensor, Tensor]:
        def outputs(values: dict[str, Tensor]) -> Tensor:
            z: Tensor = functional_call(model, values, (x_i[None],))
            return z.reshape(-1)

        z, pull, *_ = vjp(outputs, held)
        if seeds_i is None:
            seeds_i = torch.eye(len(z), dtype=z.dtype, device=z.device)
        if len(seeds_i) == 1:  # the usual case, without one more level of vmap
            flat = torch.cat([pull(seeds_i[0])[0][name].reshape(1, -1) for name in held], 1)
        else:
            (grads,) = vmap(pull)(seeds_i)
            flat = torch.cat([grads[name].reshape(len(seeds_i), -1) for name in held], 1)
        return z, flat

    width = sum(parameter.numel() for parameter in parameters.values())
    num = num_outputs if seeds is None else seeds.shape[1]
    size = _chunk(num * width, held, chunk_bytes)
    like = next(iter(held.values()))
    rows, outputs = like.new_empty(len(x), num, width), []
    with torch.no_grad(), warnings.catch_warnings():  # with gradients the results would hold a graph of every chunk
        warnings.filterwarnings("ignore", message="There is a performance drop")  # nothing the user could change
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            some = None if seeds is None else seeds[part]
            z, j = vmap(of_one, in_dims=(0, None if some is None else 0))(x[part].detach(), some)
            rows[part] = j
            outputs.append(z)
    return torch.cat(outputs), rows


def _chunk(width: int, held: Mapping[str, Tensor], chunk_bytes: int) -> int:
    size = max(tensor.element_size() for tensor in held.values())
    return max(1, chunk_bytes // (_COPIES * size * width))


def _by_single(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], x: Tensor, seeds: Tensor | None
) -> tuple[Tensor, Tensor]:
    wanted = list(parameters.values())
    outputs, rows = [], []
    for i in range(len(x)):
        with torch.enable_grad():
            z = model(x[i : i + 1].detach()).reshape(-1)
        columns = torch.eye(len(z), dtype=z.dtype, device=z.device) if seeds is None else seeds[i]
        found = []
        for c, column in enumerate(columns):
            grads = torch.autograd.grad(z, wanted, column, retain_graph=c + 1 < len(columns), materialize_grads=True)
            found.append(torch.cat([grad.reshape(-1) for grad in grads]))
        outputs.append(z.detach())
        rows.append(torch.stack(found))
    return torch.stack(outputs), torch.stack(rows)
