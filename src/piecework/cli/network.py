"""The network of a run: made from its description, behind the scaling of its features."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Dataset
from ..models import mlp
from ..models.transformer import transformer_of
from ..nn import Standardise
from ..training import BadInput, Method
from .options import NetworkOptions
from .parse import near

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def description(options: NetworkOptions, data: Dataset) -> dict[str, Any]:
    """What a recipe says about the network."""
    shape = {"num_features": data.num_features, "num_outputs": data.num_outputs, "dtype": options.dtype}
    if options.model is not None:
        return {"kind": "function", "builder": options.model, **shape}
    layers = {"hidden": list(options.hidden), "activation": options.activation}
    factors = {} if options.factors is None else {"factors": options.factors}
    return {"kind": "transformer" if data.sequences else "mlp", **layers, **factors, **shape}


def for_method(options: NetworkOptions, method: Method) -> NetworkOptions:
    """The network with an NMF layer of the method's choice, where it needs one and the user did not say."""
    rank: int | None = getattr(type(method), "auto_factors", None)
    if rank is None or options.factors is not None or options.model is not None or not options.hidden:
        return options
    return dataclasses.replace(options, factors=min(rank, options.hidden[-1]))


def build(options: NetworkOptions, data: Dataset, seed: int) -> nn.Sequential:
    """The network with its start weights, which only `seed` decides, behind `Standardise`. Raises BadInput."""
    if options.model is None:
        network = (_transformer if data.sequences else _layers)(options, data, seed)
    else:
        network = _own(options.model, data, seed).to(DTYPES[options.dtype])
        _try(network, options, data)
    return nn.Sequential(OrderedDict(scaling=Standardise(data.mean, data.scale), network=network))


def _layers(options: NetworkOptions, data: Dataset, seed: int) -> nn.Module:
    widths = [data.num_features, *options.hidden, data.num_outputs]
    if min(widths) < 1:
        given = " ".join(map(str, options.hidden))
        raise BadInput(f"--hidden takes widths of at least 1, and was given {given}")
    size = sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise(widths)) * DTYPES[options.dtype].itemsize
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        memory = 2**63
    if size > memory:
        raise BadInput(
            f"a network of widths {'-'.join(map(str, widths))} takes {size / 2**30:,.0f} GiB, "
            f"and this machine has {memory / 2**30:,.0f}; give smaller --hidden"
        )
    dtype = DTYPES[options.dtype]
    return mlp(
        data.num_features,
        options.hidden,
        data.num_outputs,
        activation=options.activation,
        factors=options.factors,
        seed=seed,
        dtype=dtype,
    )


def _transformer(options: NetworkOptions, data: Dataset, seed: int) -> nn.Module:
    """A block for each hidden width, which must be equal; heads are those of `transformer_of`."""
    if not options.hidden or len(set(options.hidden)) > 1 or options.hidden[0] < 1:
        raise BadInput(
            "--hidden of sequences takes one width, once for each transformer block, for example --hidden 64 64, and "
            f"was given {' '.join(map(str, options.hidden)) or 'none'}"
        )
    if options.factors is not None:
        raise BadInput(
            "an NMF layer (--factors, or what deepfacto puts in) is of fully connected networks, and rows of this data "
            "are sequences; leave it out, or train with local or adam"
        )
    dtype = DTYPES[options.dtype]
    return transformer_of(data.num_features, options.hidden, data.num_outputs, seed=seed, dtype=dtype)


def function(name: str) -> Callable[[int, int], nn.Module]:
    """Import package.module:function; modules of the current directory can be imported. Raises BadInput."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise BadInput(f"--model takes package.module:function, and was given {name}")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise BadInput(f"--model: {module} cannot be imported from here ({_said(error)})") from error
    if not callable(getattr(found, attribute, None)):
        raise BadInput(f"--model: {module} has no function {attribute}{near(attribute, vars(found))}")
    made: Callable[[int, int], nn.Module] = getattr(found, attribute)
    return made


def made(name: str, num_features: int, num_outputs: int, seed: int) -> nn.Module:
    """The user's own module; what it draws at random, `seed` decides. Raises BadInput for what goes wrong in it."""
    builder = function(name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            network = builder(num_features, num_outputs)
        except Exception as error:
            raise BadInput(f"--model: {name}({num_features}, {num_outputs}) failed ({_said(error)})") from error
    if not isinstance(network, nn.Module):
        raise BadInput(f"--model: {name} gives a {type(network).__name__}; it must give a torch.nn.Module")
    return network


def _own(name: str, data: Dataset, seed: int) -> nn.Module:
    return made(name, data.num_features, data.num_outputs, seed)


def _try(network: nn.Module, options: NetworkOptions, data: Dataset) -> None:
    """Refuse a network of the wrong shape before anything is trained."""
    rows = torch.zeros(2, data.num_features, dtype=DTYPES[options.dtype])
    modes = [(module, module.training) for module in network.modules()]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            z = network.eval()(rows)
    except Exception as error:
        raise BadInput(f"--model: the network does not take {tuple(rows.shape)} features ({_said(error)})") from error
    finally:
        for module, mode in modes:
            module.training = mode
    wanted = (2, *([data.num_features] if data.sequences else []), data.num_outputs)
    if not isinstance(z, Tensor) or z.shape != wanted:
        gave = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise BadInput(f"--model: 2 rows give {gave}; this data needs outputs of shape {wanted}")


def shape(options: NetworkOptions, data: Dataset) -> str:
    """The network in one word: 28-300-1, or the name of the user's function."""
    if options.model is not None:
        return options.model
    factors = () if options.factors is None else (f"nmf{options.factors}",)
    return "-".join(map(str, (data.num_features, *options.hidden, *factors, data.num_outputs)))


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
