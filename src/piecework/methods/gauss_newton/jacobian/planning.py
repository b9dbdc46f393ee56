"""The choice of a back-end for each parameter, made once and verified on a few rows.

A layer takes factors where their J^T v agrees with autograd on the probe. All else takes rows: a bare parameter, a
layer whose weight is also used outside it, one called inside a transform of torch.func or without the samples in front.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ....training import BadInput, CannotTrain, stream
from ...parameters import coupled_layers, random_layers, trainable
from .blocks import Block, Rows
from .capture import Calls, Layer, Plan, backward, block_of, outputs_of, recorded, tolerance
from .factors import Lookup, Outer
from .layer_kinds import LayerKind, inputs, kind_of
from .rows import RowsBy, sample_rows

PROBE_ROWS = 3
"""Enough for a row alone to differ from that row in company, in front and behind."""


def plan(model: nn.Module, x: Tensor) -> Plan:
    """Which back-end each trainable parameter of the model takes, from a few rows of x (n, ...), spread over it.

    Raises CannotTrain for a model that is not deterministic, that lets the rows of a batch depend on each other, that
    has parameters of several dtypes or devices, or no derivative at all, or whose rows cannot be taken at all; BadInput
    for an empty x. The global random state and the model's buffers are as before."""
    parameters = trainable(model, "gauss-newton")
    if len(x) == 0:
        raise BadInput("a plan needs at least one row to look at; got a batch of none")
    dtype = _one_dtype(parameters)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    whole = Plan(tuple(names), tuple(p.numel() for p in parameters), (), (), "vmap", 0, dtype)
    with _undisturbed(model, x.device), torch.enable_grad():
        probe = x[spread(len(x))].detach()
        z = _checked_outputs(model, probe, parameters)
        truth, idle = _truth(z, names, parameters)
        layers, reasons = _candidates(model, names)
        layers = _verified(model, probe, layers, truth, reasons)
        rows = tuple(name for name in names if name in reasons)
        by = _rows_by(model, probe, rows, truth)
        derives = _derives(model, probe, z, tolerance(dtype))
    layout = replace(whole, layers=tuple(layers), rows=rows, rows_by=by, num_outputs=z.shape[1])
    return replace(layout, reasons=reasons, idle=idle, derives=derives)


def refuse_early(model: nn.Module, rows: Tensor) -> None:
    """Raise CannotTrain for a model that draws random numbers or couples rows, as far as made-up rows (n, features) can
    tell: silent where other rows than vectors go in, and where the outputs for these are not finite.

    A layer that looks at positions takes (n, features) for one sample; in (n, 1, features) it couples nothing."""
    parameters = trainable(model, "gauss-newton")
    with _undisturbed(model, rows.device), torch.enable_grad():
        try:
            if bool(torch.isfinite(outputs_of(model, rows)).all()):
                _checked_outputs(model, rows, parameters)
        except RuntimeError:
            return
        except CannotTrain as refusal:
            try:
                _checked_outputs(model, rows[:, None], parameters)
            except (RuntimeError, CannotTrain):
                raise refusal from None


def spread(rows: int) -> Tensor:
    """The indices of a few of so many rows, from the first to the last."""
    return torch.linspace(0, max(0, rows - 1), min(rows, PROBE_ROWS), dtype=torch.float64).round().long()


def _one_dtype(parameters: Sequence[nn.Parameter]) -> torch.dtype:
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
    if len(kinds) > 1:
        given = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise CannotTrain(
            f"gauss-newton solves for all parameters at once, and they are {given}; convert the model with .to(...)"
        )
    return parameters[0].dtype


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore the global random state and the buffers, which a forward pass in training mode may alter."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    if name in before and not torch.equal(buffer, before[name]):
                        buffer.copy_(before[name])


# -- what the model must be --------------------------------------------------------------------------------------------


def _checked_outputs(model: nn.Module, probe: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """z of the probe with its graph, after the refusals."""
    coupled = [name for name in coupled_layers(model) if _uses_the_batch(model.get_submodule(name) if name else model)]
    if coupled:
        raise _coupled(coupled)
    z = outputs_of(model, probe)
    if not z.requires_grad:
        raise CannotTrain(
            "gauss-newton found no derivative of the model's output: its forward pass detaches it, or runs under "
            "no_grad; let the output depend on the parameters"
        )
    if not bool(torch.isfinite(z).all()):
        raise _not_finite()
    near, floor = tolerance(z.dtype), _rounding(z, parameters)
    if not _agree(_again(model, probe), z, near, floor):
        found = random_layers(model)
        raise CannotTrain(
            "gauss-newton needs a model that gives the same twice, and two forward passes differ"
            f"{f' (layer {found[0]})' if found else ''}; put random layers into eval(), or remove them"
        )
    for part in (slice(0, -1), slice(1, None)):
        if len(probe) > 1 and not _agree(_again(model, probe[part]), z[part], near, floor):
            raise _coupled([])
    return z


def _again(model: nn.Module, probe: Tensor) -> Tensor:
    return outputs_of(model, probe).detach()


def _derives(model: nn.Module, probe: Tensor, z: Tensor, near: float) -> bool:
    """Whether the outputs need gradients to be enabled."""
    try:
        with torch.no_grad():
            return not _agree(outputs_of(model, probe), z, near)
    except RuntimeError:
        return True


def _uses_the_batch(module: nn.Module) -> bool:
    return module.training or getattr(module, "running_mean", None) is None


def _coupled(names: Sequence[str]) -> CannotTrain:
    where = f" (layer {names[0]})" if names else ""
    return CannotTrain(
        f"gauss-newton needs rows that do not depend on each other, and the output for a row depends on its batch"
        f"{where}; put batch normalisation into eval(), or use layer or group normalisation"
    )


def _not_finite() -> CannotTrain:
    return CannotTrain(
        "gauss-newton cannot start: the model's outputs or their derivatives are not finite; scale the features, or "
        "start from smaller weights"
    )


def _agree(a: Tensor, b: Tensor, near: float, floor: float = 0.0) -> bool:
    """Whether two outputs are equal but for rounding: relative to the largest, or absolute."""
    if a.shape != b.shape or not b.numel():
        return a.shape == b.shape
    return bool((a - b).abs().max() <= max(near * float(b.detach().abs().max()), floor))


def _rounding(z: Tensor, parameters: Sequence[nn.Parameter]) -> float:
    """What rounding may leave of outputs that cancel, as those of an equation that is solved: a hundred times what
    rounded weights would change."""
    root = torch.randn(z.shape, generator=stream(0, 0), dtype=torch.float64).to(z)
    found = torch.autograd.grad(z, list(parameters), root, allow_unused=True, retain_graph=True)
    sizes = [float((g.to_dense() * p.detach()).norm()) for g, p in zip(found, parameters, strict=True) if g is not None]
    size = math.hypot(*sizes)
    return min(100 * torch.finfo(z.dtype).eps, tolerance(z.dtype)) * size if math.isfinite(size) else 0.0


# -- which layers ------------------------------------------------------------------------------------------------------


def _candidates(model: nn.Module, names: Sequence[str]) -> tuple[list[Layer], dict[str, str]]:
    """The layers whose kind has factors, and for all other parameters the reason why they take rows."""
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    users: dict[str, list[tuple[str, str]]] = {name: [] for name in by_id.values()}
    for module_name, module in model.named_modules():
        for role, parameter in module._parameters.items():
            if parameter is not None:
                users[by_id[id(parameter)]].append((module_name, role))
    groups: dict[tuple[LayerKind, tuple[str, ...]], dict[str, str]] = {}
    reasons: dict[str, str] = {}
    for name in names:
        modules = tuple(module_name for module_name, _ in users[name])
        kinds = {kind_of(model.get_submodule(module_name)) for module_name in modules}
        roles = {role for _, role in users[name]}
        kind = kinds.pop() if len(kinds) == 1 else None
        if kind is None or len(roles) != 1:
            reasons[name] = "belongs to a module whose gradient has no known factors"
        else:
            groups.setdefault((kind, modules), {})[roles.pop()] = name
    layers = [Layer(kind, mods, p.get("weight"), p.get("bias")) for (kind, mods), p in groups.items()]
    return layers, reasons


@dataclass(frozen=True)
class _Truth:
    """J^T v of the probe by autograd, (P_l,) by name, for a root of one random column a sample.

    root, v: (n, k) and (n,); near: relative; floor: what rounding leaves of a derivative that cancels, absolute."""

    gradients: Mapping[str, Tensor]
    root: Tensor
    v: Tensor
    near: float
    floor: float

    def agrees(self, block: Block, names: Sequence[str]) -> bool:
        """Whether the block's J^T v is that of autograd. The scale is that of the rows, because J^T v may cancel."""
        right = torch.cat([self.gradients[name] for name in names])
        rows = (block.diagonal() * self.v.square()).sum().sqrt()
        scale = float(torch.maximum(torch.linalg.vector_norm(right), rows))
        return float(torch.linalg.vector_norm(block.t_mv(self.v) - right)) <= max(self.near * scale, self.floor)


def _truth(z: Tensor, names: Sequence[str], parameters: Sequence[nn.Parameter]) -> tuple[_Truth, tuple[str, ...]]:
    """The gradients to compare with, and the names of parameters without one."""
    root = torch.randn(z.shape, generator=stream(0, 0), dtype=torch.float64).to(z)
    v = torch.randn(len(z), generator=stream(0, 1), dtype=torch.float64).to(z)
    found = torch.autograd.grad(z, list(parameters), root * v[:, None], allow_unused=True, retain_graph=True)
    idle = tuple(name for name, gradient in zip(names, found, strict=True) if gradient is None)
    flat = [
        (torch.zeros_like(p) if g is None else g.to_dense()).reshape(-1) for p, g in zip(parameters, found, strict=True)
    ]
    size = float(torch.stack([torch.linalg.vector_norm(gradient) for gradient in flat]).norm())
    if not math.isfinite(size):
        raise _not_finite()
    floor = 100 * torch.finfo(z.dtype).eps * size
    return _Truth(dict(zip(names, flat, strict=True)), root, v, tolerance(z.dtype), floor), idle


def _verified(
    model: nn.Module, probe: Tensor, layers: Sequence[Layer], truth: _Truth, reasons: dict[str, str]
) -> list[Layer]:
    """The layers whose factors agree with autograd; for the parameters of all others a reason is noted."""
    modules = list(dict.fromkeys(name for layer in layers for name in layer.modules))
    with recorded(model, modules) as calls:
        z = outputs_of(model, probe)
    grads = backward(z, [truth.root], calls)
    kept = []
    for layer in layers:
        why = _refused(layer, model, calls, len(probe))
        if not why:
            block = block_of(layer, model, calls, grads, len(probe), 1, truth.v.dtype)
            if truth.agrees(block, layer.parameters):
                kept.append(_measured(layer, block))
                continue
            why = "has a gradient that its layer's calls do not explain: used outside them too, or no samples in front"
        reasons.update(dict.fromkeys(layer.parameters, why))
    return kept


def _refused(layer: Layer, model: nn.Module, calls: Calls, n: int) -> str:
    for name in layer.modules:
        if name in calls.refused:
            return calls.refused[name]
    used = [(name, call) for name in layer.modules for call in calls.of.get(name, ())]
    if not used:
        return "belongs to a layer that is not called as a module"
    if any(inputs(model.get_submodule(name), call.x, n) is None for name, call in used):
        return "belongs to a layer whose input has no samples in front"
    return ""


def _measured(layer: Layer, block: Block) -> Layer:
    if isinstance(block, Outer):
        return replace(layer, uses=block.num_uses, inputs=block.a.shape[2], units=block.num_units)
    if isinstance(block, Lookup):
        return replace(layer, uses=block.num_uses, inputs=1, units=block.num_units)
    return layer


# -- how rows ----------------------------------------------------------------------------------------------------------


def _rows_by(model: nn.Module, probe: Tensor, names: Sequence[str], truth: _Truth) -> RowsBy:
    """vmap where it runs and is right, else one sample at a time. Raises CannotTrain where neither is right."""
    if not names or _rows_agree(model, probe, names, truth, "vmap"):
        return "vmap"
    if _rows_agree(model, probe, names, truth, "single"):
        return "single"
    raise CannotTrain(
        f"gauss-newton cannot take the gradient of {names[0]} sample by sample: neither vmap nor batches of one agree "
        "with the gradient of the batch; make the model work on a batch of one, rows independent of each other"
    )


def _rows_agree(model: nn.Module, probe: Tensor, names: Sequence[str], truth: _Truth, by: RowsBy) -> bool:
    try:
        seeds = truth.root[:, None]
        _, j = sample_rows(model, names, probe, seeds, num_outputs=seeds.shape[2], by=by)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # vmap fails in as many ways as there are operations
        return False
    return truth.agrees(Rows(j), names)
