"""The last linear layer in closed form, the layers before it held (variable projection).

After a Gauss-Newton step of all weights from a point where the last layer is optimal, solving for it again is algorithm
3 of Ruhe and Wedin (SIAM Review 22, 1980): the projected functional of Golub and Pereyra without its second-order term.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...layers import layers
from ...losses import Squared
from ...training import Batch, CannotTrain
from .jacobian.capture import outputs_of
from .objective import LeastSquares
from .systems import stacked_triangle

LEAST = {torch.float64: 1e-13, torch.float32: 1e-6}
"""Of the largest singular value of the layer's inputs: directions below are left as they are."""


def output_layer(objective: LeastSquares) -> nn.Linear:
    """The last layer. Raises CannotTrain where it is no trainable nn.Linear that gives the outputs, or the loss is not
    squared."""
    last = list(layers(objective.model))[-1][1]
    if not isinstance(last, nn.Linear) or not last.weight.requires_grad:
        raise CannotTrain(
            f"eliminate_output needs a sequence of layers that ends in a trainable nn.Linear, and this model ends in "
            f"{type(last).__name__}; set eliminate_output=False"
        )
    own = {id(parameter) for parameter in last.parameters()}
    users = [module for module in objective.model.modules() for one in module._parameters.values() if id(one) in own]
    if len(users) > len(own) or sum(layer is last for _, layer in layers(objective.model)) > 1:
        raise CannotTrain(
            "eliminate_output solves for the last layer with the layers before it held, and its weights are used there "
            "too; set eliminate_output=False"
        )
    if not isinstance(objective.loss, Squared):
        raise CannotTrain(
            f"eliminate_output has a closed form for the squared loss, not for {objective.loss.name}; "
            "set eliminate_output=False, or take the squared loss"
        )
    return last


@torch.no_grad()
def eliminate_(objective: LeastSquares, batch: Batch, layer: nn.Linear, rows: int) -> None:
    """Give the layer the weights with the least loss and penalty nearest to its present ones; none where what goes into
    it is not finite. Collective; one forward pass."""
    bias = layer.bias is not None and bool(layer.bias.requires_grad)
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    width = layer.in_features + bias
    triangle = torch.zeros(0, width + layer.out_features, dtype=torch.float64, device=objective.device)
    try:
        for x, y in objective.tiles(batch):
            z = outputs_of(objective.model, x)
            a = seen.pop().reshape(-1, layer.in_features).double()
            ones = [torch.ones(len(a), 1, dtype=a.dtype, device=a.device)] if bias else []
            wanted = (objective.loss.targets(y, z.shape[1], torch.float64) - z.double()).reshape(len(a), -1)
            triangle = stacked_triangle(torch.cat([triangle, torch.cat([a, *ones, wanted], 1)]))
    finally:
        handle.remove()
    if objective.group.size > 1:
        triangle = stacked_triangle(torch.cat(objective.group.gather(triangle)))
    if not bool(torch.isfinite(triangle).all()):  # no layer helps: the loss there is not finite either
        return
    if decay := objective.decay(rows):
        present = torch.cat([layer.weight, layer.bias[:, None]], 1) if bias else layer.weight
        penalty = torch.cat([torch.eye(width, dtype=torch.float64, device=objective.device), -present.t().double()], 1)
        triangle = stacked_triangle(torch.cat([triangle, math.sqrt(decay / 2) * penalty]))
    u, values, vt = torch.linalg.svd(triangle[:width, :width])
    least = LEAST.get(objective.dtype, 1e-6) * values[0]
    weight = torch.where(values > 0, values / (values.square() + least.square()), torch.zeros_like(values))
    change = (vt.t() @ (weight[:, None] * (u.t() @ triangle[:width, width:]))).t()
    layer.weight.add_(change[:, : layer.in_features].to(layer.weight))
    if bias:
        layer.bias.add_(change[:, -1].to(layer.bias))
