"""What an optimiser remembers of its parameters, as plain values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..training import BadInput

Entries = list[dict[str, Tensor]]
"""For each parameter, in order, its tensors by name; empty before the first step."""


def entries_of(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Entries:
    """Copies of what the optimiser remembers, parameter by parameter."""
    states = (optimizer.state.get(parameter, {}) for parameter in parameters)
    return [
        {name: value.detach().clone() for name, value in state.items() if isinstance(value, Tensor)} for state in states
    ]


def put_entries(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], found: Entries) -> None:
    """The counterpart of `entries_of`. Raises BadInput for entries that do not fit the parameters."""
    if len(found) != len(parameters):
        raise BadInput(f"the state has {len(found)} parameters, and this model {len(parameters)} to train")
    for number, (parameter, entries) in enumerate(zip(parameters, found, strict=True)):
        for name, value in entries.items():
            if value.shape != (torch.Size() if name == "step" else parameter.shape):
                raise BadInput(
                    f"the state of parameter {number} has {name} of shape {tuple(value.shape)}, "
                    f"which does not fit a parameter of shape {tuple(parameter.shape)}"
                )
    groups = optimizer.state_dict()["param_groups"]
    # torch keeps what it is given where dtype and device agree, and its steps are in place: so it gets copies.
    entries_by_number = {
        number: {name: value.detach().clone() for name, value in entries.items()}
        for number, entries in enumerate(found)
        if entries
    }
    optimizer.load_state_dict({"state": entries_by_number, "param_groups": groups})
