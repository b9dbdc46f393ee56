"""One forward and C backward passes of a model give its outputs z (n, k) and the Jacobian's blocks.

The rows of sample i are B_i^T dz_i/dtheta, B_i (k, C) the curvature root: `seeds(z)` gives its columns, C tensors
(n, k), each entry of which may depend on its own sample's outputs; without, B is the unit matrix and C = k.

Differs from the well-known implementation (BackPACK's and ASDL's hooks): what is recorded of an output is its place in
the graph, not the tensor, so that an activation that overwrites it afterwards does no harm; all calls of a layer are
kept, because the products between them belong to K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ....training import BadInput, CannotTrain
from .blocks import Block, Rows
from .factors import Lookup, Outer
from .layer_kinds import LayerKind, inputs, outputs
from .rows import CHUNK_BYTES, RowsBy, sample_rows
from .whole import Jacobian

Seeds = Callable[[Tensor], Sequence[Tensor]]
"""z (n, k) -> the columns of the curvature root: C tensors (n, k)."""


@dataclass(frozen=True)
class Layer:
    """Parameters that form one block of factors (or of rows, for a norm) and the modules that use them.

    weight, bias: names in the model, None where not trained. uses, inputs, units: T, A and D as the probe saw them."""

    kind: LayerKind
    modules: tuple[str, ...]
    weight: str | None
    bias: str | None
    uses: int = 0
    inputs: int = 0
    units: int = 0

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.bias) if name is not None)


@dataclass(frozen=True)
class Plan:
    """Which back-end each parameter takes; made once by `plan`.

    names, sizes: of the trainable parameters, in the model's order; rows: those without factors, whose gradient is
    taken sample by sample; rows_by: how; reasons: why, by name; num_outputs: k; dtype: of all parameters; idle:
    those that no row of the probe has a derivative by: their columns are 0 there, and it is for the caller to say so
    (the last bias of a Laplacian's net is one); derives: the forward pass takes derivatives by autograd itself, and so
    cannot run under no_grad."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    layers: tuple[Layer, ...]
    rows: tuple[str, ...]
    rows_by: RowsBy
    num_outputs: int
    dtype: torch.dtype
    reasons: Mapping[str, str] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    derives: bool = False

    @property
    def num_parameters(self) -> int:
        """P."""
        return sum(self.sizes)

    def places(self, names: Sequence[str]) -> tuple[slice, ...]:
        """Where these parameters lie in the flat vector; neighbours as one piece."""
        found: list[slice] = []
        for name in names:
            position = self.names.index(name)
            start = sum(self.sizes[:position])
            stop = start + self.sizes[position]
            if found and found[-1].stop == start:
                found[-1] = slice(found[-1].start, stop)
            else:
                found.append(slice(start, stop))
        return tuple(found)

    def back_end(self, name: str) -> Literal["factors", "rows"]:
        return "rows" if name in self.rows else "factors"


def predicted_bytes(plan: Plan, n: int, num_outputs: int | None = None) -> int:
    """What the Jacobian of n samples with C = `num_outputs` rows each (k without) will keep, before anything is made.

    Exact where each sample uses the weights as often as those of the probe did, and rows that are views of the
    input counted as if they were copies."""
    c, size = plan.num_outputs if num_outputs is None else num_outputs, plan.dtype.itemsize
    found = sum(n * c * plan.sizes[plan.names.index(name)] * size for name in plan.rows)
    for layer in plan.layers:
        if layer.kind == "norm":
            found += n * c * sum(plan.sizes[plan.names.index(name)] for name in layer.parameters) * size
            continue
        place = torch.int64.itemsize if layer.kind == "embedding" else size * layer.inputs
        found += n * layer.uses * (place + c * layer.units * size)
    return found


def capture(
    model: nn.Module, plan: Plan, x: Tensor, seeds: Seeds | None = None, *, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Jacobian]:
    """The outputs z (n, k), without a graph, and the Jacobian (n C, P) of `seeds` at the model's present weights.

    x: (n, ...). chunk_bytes: what explicit rows under construction may take at once. One forward and C backward passes
    for the factors, and one pass more for the parameters that take rows. Raises BadInput for an empty batch or seeds
    of another shape than z, CannotTrain where the model does not treat x as the probe of its plan."""
    if len(x) == 0:
        raise BadInput("a Jacobian needs at least one sample; got a batch of none")
    if not plan.layers and seeds is None:
        z, j = _rows(model, plan, x, None, chunk_bytes)
        return z, Jacobian((Rows(j),), (plan.places(plan.rows),), plan.num_parameters)
    z, roots, calls, grads = _passes(model, plan, x, seeds)
    blocks: list[Block] = []
    for position, layer in enumerate(plan.layers):
        blocks.append(block_of(layer, model, calls, grads, len(x), len(roots), plan.dtype))
        still = {name for later in plan.layers[position + 1 :] for name in later.modules}
        for name in set(layer.modules) - still:  # else gradients would stay beside their copies up to the last layer
            calls.of.pop(name, None)
            for of_root in grads:
                of_root.pop(name, None)
    places = [plan.places(layer.parameters) for layer in plan.layers]
    if plan.rows:
        _, j = _rows(model, plan, x, torch.stack(list(roots), 1), chunk_bytes)
        blocks.append(Rows(j))
        places.append(plan.places(plan.rows))
    return z, Jacobian(tuple(blocks), tuple(places), plan.num_parameters)


def _rows(model: nn.Module, plan: Plan, x: Tensor, seeds: Tensor | None, chunk_bytes: int) -> tuple[Tensor, Tensor]:
    k = plan.num_outputs
    return sample_rows(model, plan.rows, x, seeds, num_outputs=k, by=plan.rows_by, chunk_bytes=chunk_bytes)


def outputs_of(model: nn.Module, x: Tensor) -> Tensor:
    """z (n, k): what the model says of n samples; (n,) counts as (n, 1), and images of outputs are laid flat."""
    z = model(x.detach())
    if not isinstance(z, Tensor) or z.dim() == 0 or len(z) != len(x):
        given = f"a tensor {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise CannotTrain(
            f"gauss-newton needs a model that gives one row of outputs for each sample; {len(x)} samples gave {given}; "
            "return a tensor (n, k)"
        )
    return z.reshape(len(x), -1)


def values_of(model: nn.Module, plan: Plan, x: Tensor) -> Tensor:
    """`outputs_of` without a graph, also of a model that needs one within its forward pass."""
    with torch.set_grad_enabled(plan.derives):
        return outputs_of(model, x).detach()


def tolerance(dtype: torch.dtype) -> float:
    """Relative, for two ways to one number: a thousand times what rounding usually leaves."""
    return {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 2e-2)


# -- recording ---------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One use of a module: what went in, where in the graph the output is, and its shape."""

    x: Tensor
    edge: GradientEdge
    shape: torch.Size


class Calls:
    """All uses of some modules in one forward pass, in order; refused: those that cannot be recorded, and why."""

    def __init__(self) -> None:
        self.of: dict[str, list[Call]] = {}
        self.refused: dict[str, str] = {}

    @property
    def edges(self) -> list[GradientEdge]:
        return [call.edge for calls in self.of.values() for call in calls]

    def note(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            self.refused[name] = "is called with something else than a tensor"
        elif _transformed(x) or _transformed(output):
            self.refused[name] = "is called inside a transform of torch.func"
        elif output.requires_grad:
            self.of.setdefault(name, []).append(Call(x.detach(), _edge(output), output.shape))


def _edge(output: Tensor) -> GradientEdge:
    """Where the derivative by an output arrives, in its order of elements. An activation that overwrites a view (a
    linear layer over positions gives one) takes the view's own node out of the graph, but not that of its base."""
    base = output._base
    if base is None or not base.requires_grad or base.numel() != output.numel():
        return get_gradient_edge(output)
    return get_gradient_edge(base if base.is_contiguous() and output.is_contiguous() else output)


def _transformed(tensor: Tensor) -> bool:
    # Torch has no public name for this; such a tensor is not valid outside the transform that made it.
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@contextmanager
def recorded(model: nn.Module, names: Sequence[str]) -> Iterator[Calls]:
    """Note the calls of these modules while the context lasts."""
    calls = Calls()
    handles = []
    for name in names:

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            calls.note(name, args, kwargs, output)

        # First of all hooks: others may change what the layer gave.
        handles.append(model.get_submodule(name).register_forward_hook(hook, prepend=True, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


Gradients = list[dict[str, list[Tensor | None]]]
"""For each column of the root: for each module, the derivative by what each of its calls gave."""


def _passes(
    model: nn.Module, plan: Plan, x: Tensor, seeds: Seeds | None
) -> tuple[Tensor, Sequence[Tensor], Calls, Gradients]:
    """The forward pass and the C backward passes, which stop at the layers' outputs: no gradient of a weight."""
    names = list(dict.fromkeys(name for layer in plan.layers for name in layer.modules))
    with torch.enable_grad(), recorded(model, names) as calls:
        z = outputs_of(model, x) if names else values_of(model, plan, x)
    if calls.refused:
        name, why = next(iter(calls.refused.items()))
        raise CannotTrain(f"layer {name} {why}, and it was not when the plan was made; make a new plan")
    roots = unit_seeds(z) if seeds is None else list(seeds(z.detach()))
    for root in roots:
        if root.shape != z.shape:
            raise BadInput(f"seeds are tensors of the outputs' shape {tuple(z.shape)}; got {tuple(root.shape)}")
    return z.detach(), roots, calls, backward(z, roots, calls)


def unit_seeds(z: Tensor) -> list[Tensor]:
    """The columns of B = I: k tensors (n, k)."""
    return [row.expand_as(z) for row in torch.eye(z.shape[1], dtype=z.dtype, device=z.device)]


def backward(z: Tensor, roots: Sequence[Tensor], calls: Calls) -> Gradients:
    """The derivatives of (z * root).sum(), for each root, by what the recorded layers gave."""
    edges, found = calls.edges, []
    for root in roots:
        grads: Sequence[Tensor | None] = ()
        if edges:
            keep = root is not roots[-1]
            grads = torch.autograd.grad(z, edges, root, retain_graph=keep, allow_unused=True)
        flat = iter(grads)
        found.append({name: [next(flat) for _ in uses] for name, uses in calls.of.items()})
    return found


# -- blocks ------------------------------------------------------------------------------------------------------------


def block_of(
    layer: Layer, model: nn.Module, calls: Calls, grads: Gradients, n: int, c: int, dtype: torch.dtype
) -> Block:
    """The block of one layer of the plan from its recorded calls."""
    sides_a, sides_d = [], []
    for name in layer.modules:
        module = model.get_submodule(name)
        for position, call in enumerate(calls.of.get(name, ())):
            a = inputs(module, call.x, n)
            if a is None:
                given = tuple(call.x.shape)
                raise CannotTrain(
                    f"layer {name} was given {given}, which is not a whole number of rows for {n} samples"
                )
            d = _stacked([one[name][position] for one in grads], call, module, n, dtype)
            sides_a.append(a)
            sides_d.append(d)
    if layer.kind == "norm":
        return Rows(_norm_rows(layer, model, sides_a, sides_d, n, c, dtype))
    if not sides_a:  # a layer that this batch did not go through
        sides_a, sides_d = _nothing(layer, model, n, c, dtype)
    a = sides_a[0] if len(sides_a) == 1 else torch.cat(sides_a, 1)
    d = sides_d[0] if len(sides_d) == 1 else torch.cat(sides_d, 2)
    if layer.kind == "embedding":
        table = model.get_submodule(layer.modules[0])
        assert isinstance(table, nn.Embedding)
        if table.padding_idx is not None:
            d = d * (a != table.padding_idx)[:, None, :, None]
        return Lookup(a, d, table.num_embeddings)
    if layer.weight is None:
        a = a[..., :0]
    return Outer(a.to(dtype), d, layer.bias is not None)


def _stacked(grads: list[Tensor | None], call: Call, module: nn.Module, n: int, dtype: torch.dtype) -> Tensor:
    """(n, C, T, D) of one call, contiguous, because products view it in several ways."""
    like = next((grad for grad in grads if grad is not None), None)
    if like is None:
        like = torch.zeros(call.shape, dtype=dtype, device=call.x.device)
    whole = [(torch.zeros_like(like) if grad is None else grad).reshape(call.shape) for grad in grads]
    found = [outputs(module, grad, n).to(dtype) for grad in whole]
    return (found[0].unsqueeze(1) if len(found) == 1 else torch.stack(found, 1)).contiguous()


def _norm_rows(
    layer: Layer, model: nn.Module, sides_a: list[Tensor], sides_d: list[Tensor], n: int, c: int, dtype: torch.dtype
) -> Tensor:
    parameters = [model.get_parameter(name) for name in layer.parameters]
    rows = torch.zeros(n, c, sum(p.numel() for p in parameters), dtype=dtype, device=parameters[0].device)
    for a, d in zip(sides_a, sides_d, strict=True):
        parts = []
        if layer.weight is not None:
            parts.append((d * a[:, None].to(dtype)).sum(2))
        if layer.bias is not None:
            parts.append(d.sum(2))
        rows += torch.cat(parts, 2)
    return rows


def _nothing(layer: Layer, model: nn.Module, n: int, c: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    device = model.get_parameter(layer.parameters[0]).device
    d = torch.zeros(n, c, 1, layer.units, dtype=dtype, device=device)
    if layer.kind == "embedding":
        return [torch.zeros(n, 1, dtype=torch.int64, device=device)], [d]
    return [torch.zeros(n, 1, layer.inputs, dtype=dtype, device=device)], [d]
