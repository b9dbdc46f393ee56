"""A model as blocks: a sequence of blocks is an `nn.Sequential`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .evaluation import deployed
from .layers import is_sequence, layers
from .training import BadInput


def split(
    model: nn.Module, *, at: Sequence[int | str] | None = None, into: int | None = None, example: Tensor | None = None
) -> nn.Sequential:
    """The model as consecutive blocks, an `nn.Sequential` of `nn.Sequential`s that shares its modules and parameters.

    model: an `nn.Sequential`; plain ones inside it are opened, any other module stays whole.
    at: where the second block and those after it begin: positions in the opened sequence, or names of modules in it; or
    into: how many blocks to make. Every block then begins with a module that has parameters (what comes before the
        first of them goes with it), and the most expensive block is as cheap as it can be.
    example: rows of input, (n, ...); a block then costs the multiplications of its linear and convolutional layers on
        them, plus its other parameters. Without it a block costs its number of parameters.
    Raises BadInput for a model or places that cannot be cut."""
    if not is_sequence(model, open_hooked=False):
        raise BadInput(
            f"split cuts an nn.Sequential, got {type(model).__name__}; put its parts into one, in their order"
        )
    named = list(layers(model, open_hooked=False))
    modules = [module for _, module in named]
    if (at is None) == (into is None):
        raise BadInput("split needs either at=, the places to cut, or into=, the number of blocks")
    if at is not None:
        starts = _checked(_positions(model, at, [name for name, _ in named]), len(modules))
    else:
        starts = _balanced(_costs(model, modules, example), into or 0)
    ends = [*starts[1:], len(modules)]
    blocks = [nn.Sequential(*modules[start:end]) for start, end in zip(starts, ends, strict=True)]
    _refuse_ties(blocks)
    return nn.Sequential(*blocks)


def _positions(model: nn.Module, at: Sequence[int | str], names: Sequence[str]) -> list[int]:
    """The places as numbers; a sequence's name is that of its first module."""
    inside = {name for name, _ in model.named_modules()}
    found: list[int] = []
    for place in at:
        if not isinstance(place, str):
            found.append(place)
        elif place in names:
            found.append(names.index(place))
        elif opened := [number for number, name in enumerate(names) if name.startswith(f"{place}.")]:
            found.append(opened[0])
        elif place in inside:
            whole = next(name for name in names if place.startswith(f"{name}."))
            kind = type(model.get_submodule(whole)).__name__
            raise BadInput(f"{place} is inside {whole} ({kind}), which is one module; cut before or behind it")
        else:
            raise BadInput(f"there is no module {place!r} to cut before; there are {', '.join(names)}")
    return found


def _checked(at: Sequence[int], length: int) -> list[int]:
    starts = [0, *at]
    if any(not isinstance(place, int) or isinstance(place, bool) for place in starts):
        raise BadInput(f"at= takes whole numbers, got {list(at)}")
    if any(later <= earlier for earlier, later in zip(starts, [*starts[1:], length], strict=True)):
        raise BadInput(
            f"at= takes rising positions from 1 to {length - 1} in this model of {length} modules, got {list(at)}"
        )
    return starts


def _costs(model: nn.Module, modules: Sequence[nn.Module], example: Tensor | None) -> list[float]:
    """What each module costs, 0 for one without parameters."""
    costs = [float(sum(one.numel() for one in module.parameters())) for module in modules]
    if example is None:
        return costs
    extra = [0.0] * len(modules)
    hooks = []
    for number, module in enumerate(modules):
        for layer in module.modules():
            if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):

                def count(layer: nn.Module, given: tuple[Tensor, ...], out: Tensor, number: int = number) -> None:
                    extra[number] += _products(layer, given[0], out) - sum(one.numel() for one in layer.parameters())

                hooks.append(layer.register_forward_hook(count))
    try:
        with deployed(model):
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return [cost and max(cost + more, 1.0) for cost, more in zip(costs, extra, strict=True)]


def _products(layer: nn.Module, given: Tensor, out: Tensor) -> float:
    """Multiplications of one call: each weight meets each place of the output (of the input, if transposed)."""
    assert isinstance(layer.weight, Tensor)
    if isinstance(layer, nn.Linear):
        return layer.weight.numel() * out.numel() / layer.weight.shape[0]
    places = given if getattr(layer, "transposed", False) else out
    return layer.weight.numel() * places.numel() / places.shape[1]


def _balanced(costs: Sequence[float], into: int) -> list[int]:
    """Where the blocks start, so that the largest sum of costs is least; by dynamic programming over the cuts."""
    starts = [number for number, cost in enumerate(costs) if cost > 0]
    if not 1 <= into <= len(starts):
        found = f"this model has {len(starts)} modules with parameters"
        raise BadInput(f"{found}, so it can be cut into 1 to {len(starts)} blocks, got {into}")
    starts[0] = 0
    upto = [0.0]
    for start, end in zip(starts, [*starts[1:], len(costs)], strict=True):
        upto.append(upto[-1] + sum(costs[start:end]))
    # best[k][j]: the least largest block when the first j pieces make k blocks, and where the last of them starts.
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for _ in range(into):
        row = {}
        for j in range(1, len(upto)):
            choices = [(max(worst, upto[j] - upto[i]), i) for i, (worst, _) in best[-1].items() if i < j]
            if choices:
                row[j] = min(choices)
        best.append(row)
    cuts, j = [], len(starts)
    for k in range(into, 0, -1):
        j = best[k][j][1]
        cuts.append(starts[j])
    return cuts[::-1]


def _refuse_ties(blocks: Sequence[nn.Module]) -> None:
    seen: dict[int, int] = {}
    for number, block in enumerate(blocks):
        for parameter in block.parameters():
            if seen.setdefault(id(parameter), number) != number:
                raise BadInput(
                    f"blocks {seen[id(parameter)]} and {number} share a parameter of shape {tuple(parameter.shape)}; "
                    "cut where tied layers stay together"
                )
