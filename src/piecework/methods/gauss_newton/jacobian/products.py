"""Products with J, J^T and K = J J^T without any factor of J: for black boxes, many rows a sample, or little memory.

With z = f(theta; x), (n, k), B the curvature root and J = B^T dz/dtheta:

    J^T v = (dz/dtheta)^T (B v)                      one backward pass of the graph of z
    J w = B^T d(u^T dz/dtheta)/du w, any u           one backward pass of the graph of u -> (dz/dtheta)^T u

The second (R-operator by two reverse passes; Townsend 2017) builds its graph once for all w. A product with K costs
about 8 n P operations whatever C is, where factors take 4 n C P (4 n P for linear layers): matrix-free wins by
operations only for C > 2 where layers have no factors, and by memory always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from ....training import BadInput, CannotTrain, stream
from ...parameters import packed, trainable
from .capture import outputs_of, tolerance

Root = Callable[[Tensor, slice], Tensor]
"""A product with the curvature root, or its transpose, for some samples: see `MatrixFree`."""


@dataclass(frozen=True)
class _Graph:
    """z of some samples, and its backward pass (dz/dtheta)^T u as a graph in u where it is asked for."""

    z: Tensor
    u: Tensor
    pulled: tuple[Tensor, ...]


class MatrixFree:
    """J (N, P) of some samples as products; N = n C, and columns in the order of `trainable(model, ...)`.

    x: (n, ...). num_outputs: C, needed with a root; k without. root_mv: ((b, C), part) -> B v, (b, k), of the samples
    `part`; root_t_mv: ((b, k), part) -> B^T z, (b, C); without them B is the unit matrix. tile: samples that pass
    through the network at once; None is all. keep: whether their graphs are built once and kept until the object goes,
    or built anew in each product, 4 n P operations more; None keeps them where there is one tile.

    forward_mode: J w by torch.func.jvp, a forward pass each time, for operations whose backward pass has no
    derivative; None finds out in the first product, by one more backward pass, and then holds what was found.

    The weights are copied: the model may move on while products are made at the old ones. Raises BadInput for one root
    without the other."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        *,
        num_outputs: int | None = None,
        root_mv: Root | None = None,
        root_t_mv: Root | None = None,
        tile: int | None = None,
        keep: bool | None = None,
        forward_mode: bool | None = None,
    ) -> None:
        if (root_mv is None) != (root_t_mv is None) or (root_mv is None) != (num_outputs is None):
            raise BadInput("a curvature root is root_mv, root_t_mv and num_outputs together; give all of them, or none")
        if tile is not None and tile < 1:
            raise BadInput(f"tile is a number of samples, at least 1; got {tile}")
        self._model, self._x = model, x
        self._parameters = [p.detach().clone().requires_grad_() for p in trainable(model, "gauss-newton")]
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        self._root_mv, self._root_t_mv = root_mv, root_t_mv
        self._tile = len(x) if tile is None else min(tile, len(x))
        self._keep = self._tile == len(x) if keep is None else keep
        self._kept: list[tuple[slice, _Graph]] = []
        self.forward_mode = forward_mode
        if num_outputs is None:
            with torch.enable_grad():  # models with derivatives inside need it
                num_outputs = outputs_of(model, x[:1]).shape[1]
        self.num_samples, self.num_outputs = len(x), num_outputs
        self.num_columns = sum(parameter.numel() for parameter in self._parameters)

    @property
    def num_rows(self) -> int:
        """N."""
        return self.num_samples * self.num_outputs

    def mv(self, w: Tensor) -> Tensor:
        """J w: (P,) -> (N,)."""
        return torch.cat([self._push(graph, part, w) for part, graph in self._graphs(need_double=True)])

    def t_mv(self, v: Tensor) -> Tensor:
        """J^T v: (N,) -> (P,)."""
        out = torch.zeros(self.num_columns, dtype=v.dtype, device=v.device)
        for part, graph in self._graphs(need_double=False):
            out += self._pull(graph, part, v)
        return out

    def product(self, v: Tensor) -> Tensor:
        """K v: (N,) or (N, k)."""
        if v.dim() == 2:
            return torch.stack([self.product(column) for column in v.t()], 1)
        return self.mv(self.t_mv(v))

    def _graphs(self, *, need_double: bool) -> Iterator[tuple[slice, _Graph]]:
        size = len(self._x)
        parts = [slice(start, min(start + self._tile, size)) for start in range(0, size, self._tile)]
        if self._keep and not self._kept:
            self._kept = [(part, self._graph(part, need_double=True)) for part in parts]
        yield from self._kept or ((part, self._graph(part, need_double=need_double)) for part in parts)

    def _graph(self, part: slice, *, need_double: bool) -> _Graph:
        with torch.enable_grad():
            z = self._outputs(dict(zip(self._names, self._parameters, strict=True)), self._x[part])
            u = torch.zeros_like(z).requires_grad_()
            if not need_double:
                return _Graph(z, u, ())
            pulled = torch.autograd.grad(z, self._parameters, u, create_graph=True, materialize_grads=True)
            return _Graph(z, u, pulled)

    def _pull(self, graph: _Graph, part: slice, v: Tensor) -> Tensor:
        rows = v[part.start * self.num_outputs : part.stop * self.num_outputs].to(graph.z.dtype)
        rows = rows.view(-1, self.num_outputs)
        seed = rows if self._root_mv is None else self._root_mv(rows, part)
        grads = torch.autograd.grad(graph.z, self._parameters, seed, retain_graph=self._keep, materialize_grads=True)
        return packed(grads).to(v.dtype)

    def _push(self, graph: _Graph, part: slice, w: Tensor) -> Tensor:
        pieces = torch.split(w, [parameter.numel() for parameter in self._parameters])
        tangents = [p.view(q.shape).to(q.dtype) for p, q in zip(pieces, self._parameters, strict=True)]
        if self.forward_mode is None:
            self.forward_mode = not self._agrees(graph)
        moved = self._forward(part, tangents) if self.forward_mode else self._twice_back(graph, tangents)
        rows = moved if self._root_t_mv is None else self._root_t_mv(moved, part)
        return rows.reshape(-1).to(w.dtype)

    def _twice_back(self, graph: _Graph, tangents: Sequence[Tensor]) -> Tensor:
        pairs = [(g, t) for g, t in zip(graph.pulled, tangents, strict=True) if g.requires_grad]
        pulled, kept = [g for g, _ in pairs], [t for _, t in pairs]
        # In tiles the graph of z is needed once more, until it is known that the products are right.
        keep = self._keep or self.forward_mode is None
        (moved,) = torch.autograd.grad(pulled, graph.u, kept, retain_graph=keep, materialize_grads=True)
        return moved

    def _agrees(self, graph: _Graph) -> bool:
        """Whether r'(J w) = (J'r)'w for random r and w: an operation that is differentiable once is left out of J w
        without a word, because the error it would raise is not on the way to u."""
        r = torch.randn(graph.z.shape, generator=stream(0, 0), dtype=torch.float64).to(graph.z)
        generator = stream(0, 1)
        tangents = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in self._parameters]
        try:
            moved = self._twice_back(graph, tangents)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # a derivative that is not implemented
            return False
        grads = torch.autograd.grad(graph.z, self._parameters, r, retain_graph=True, materialize_grads=True)
        there, back = packed(grads).double(), packed(tangents).double()
        scale = torch.linalg.vector_norm(moved.double()) * torch.linalg.vector_norm(r.double())
        scale = torch.maximum(scale, torch.linalg.vector_norm(there * back))
        return bool(((moved.double() * r).sum() - there.dot(back)).abs() <= tolerance(graph.z.dtype) * scale)

    def _forward(self, part: slice, tangents: Sequence[Tensor]) -> Tensor:
        """Forward mode: a forward pass each time."""

        def outputs(values: dict[str, Tensor]) -> Tensor:
            return self._outputs(values, self._x[part])

        held = {name: p.detach() for name, p in zip(self._names, self._parameters, strict=True)}
        try:
            moved: Tensor = jvp(outputs, (held,), (dict(zip(self._names, tangents, strict=True)),))[1]
        except NotImplementedError as error:
            raise CannotTrain(
                "products with J need a second derivative backwards, or one forwards, and the model has neither: "
                f"{error}; replace that operation, or take explicit rows"
            ) from error
        return moved

    def _outputs(self, values: dict[str, Tensor], x: Tensor) -> Tensor:
        z: Tensor = functional_call(self._model, values, (x.detach().to(self._parameters[0].device),))
        return z.reshape(len(x), -1)
