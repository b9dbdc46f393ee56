"""Two published methods that train a network layer by layer, written anew from their papers, for `block_peers.py`.

AM-Adam: Choromanska et al., "Beyond Backprop: Online Alternating Minimization with Auxiliary Variables", ICML 2019,
arXiv:1806.09077. Block coordinate descent: Zeng, Lau, Lin, Yao, "Global Convergence of Block Coordinate Descent in
Deep Learning", ICML 2019, arXiv:1803.00225, three-splitting with a squared loss. Both take linear layers with ReLUs
between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from piecework import Batch, losses
from piecework.group import Group
from piecework.methods.schedule import Schedule, set_rate
from piecework.training import Metrics, Training


def front_and_layers(model: nn.Module) -> tuple[nn.Sequential, list[nn.Linear]]:
    """What comes before the first linear layer, and the linear layers."""
    modules = list(model.children())
    first = next(number for number, one in enumerate(modules) if isinstance(one, nn.Linear))
    assert all(isinstance(one, (nn.Linear, nn.ReLU)) for one in modules[first:])
    return nn.Sequential(*modules[:first]), [one for one in modules if isinstance(one, nn.Linear)]


class _AtWork:
    """What the loop wants to know of both."""

    data: Literal["shard", "same"] = "shard"
    deterministic = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._front, self._layers = front_and_layers(model)

    def sync(self) -> None:
        """The model is the deployed network at all times."""

    def state_dict(self) -> dict[str, Any]:
        """Runs of the benchmark are never resumed."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError("runs of the benchmark are never resumed")


# -- AM-Adam -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AlternatingAdam:
    """Codes c_l, what each hidden linear layer gives, start from a forward pass. From the top down each takes
    `code_steps` Nesterov steps on weight * loss (top) or the mean squared error of the next layer's code (others), plus
    the mean squared distance to where it was; then each layer takes a step of its own Adam towards its code."""

    lr: float
    schedule: Schedule = "constant"
    schedule_steps: int = 0
    warmup_steps: int = 0
    code_steps: int = 5
    code_lr: float = 0.3
    mu: float = 0.003

    def bind(self, model: nn.Module, loss: losses.Loss, *, group: Group | None = None) -> Training[Batch]:
        return _Alternating(self, model, loss)


class _Alternating(_AtWork):
    batches: Literal["mini", "full"] = "mini"

    def __init__(self, recipe: AlternatingAdam, model: nn.Module, loss: losses.Loss) -> None:
        super().__init__(model)
        self._recipe, self._loss, self._step = recipe, loss, 0
        self._optimizers = [torch.optim.Adam(layer.parameters(), lr=recipe.lr, fused=True) for layer in self._layers]

    def step(self, batch: Batch) -> Metrics:
        *hidden, last = self._layers
        with torch.no_grad():
            inputs, codes = [self._front(batch.x)], []
            for layer in hidden:
                codes.append(layer(inputs[-1]))
                inputs.append(codes[-1].relu())
            loss = self._loss(last(inputs[-1]), batch.y)
        for number in reversed(range(len(codes))):
            codes[number] = self._moved(number, codes, batch.y)
        self._learn(len(hidden), self._loss(last(codes[-1].relu()), batch.y))
        for number, layer in enumerate(hidden):
            given = inputs[0] if number == 0 else codes[number - 1].relu()
            self._learn(number, F.mse_loss(layer(given), codes[number]))
        self._step += 1
        return {"loss": loss}

    def _moved(self, number: int, codes: list[Tensor], y: Tensor) -> Tensor:
        recipe, start, above = self._recipe, codes[number], self._layers[number + 1]
        code = start.clone().requires_grad_()
        optimizer = torch.optim.SGD([code], lr=recipe.code_lr, momentum=0.9, nesterov=True)
        for _ in range(recipe.code_steps):
            out = above(code.relu())
            top = number == len(codes) - 1
            error = self._loss(out, y) / recipe.mu if top else F.mse_loss(out, codes[number + 1])
            (code.grad,) = torch.autograd.grad(error + F.mse_loss(code, start), [code])
            optimizer.step()
        return code.detach()

    def _learn(self, number: int, loss: Tensor) -> None:
        optimizer = self._optimizers[number]
        set_rate(self._recipe, self._step, optimizer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# -- block coordinate descent ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CoordinateDescent:
    """min 1/2 ||V_N - Y||^2 + sum_i gamma/2 ||V_i - s_i(U_i)||^2 + rho/2 ||U_i - W_i V_{i-1} - b_i||^2, with s_i the
    ReLU and s_N the identity: every block in closed form, from the last layer down, over all samples. alpha: weight of
    the squared distance to where U_i, W_i and V_N were. spread: standard deviation that the weights are
    scaled to at the start, with biases of 0.1 (the authors' start has 0.01); 0: the weights as they are."""

    gamma: float = 1.0
    rho: float = 1.0
    alpha: float = 5.0
    spread: float = 0.0

    def bind(self, model: nn.Module, loss: losses.Loss, *, group: Group | None = None) -> Training[Batch]:
        return _Descent(self, model, loss)


class _Descent(_AtWork):
    batches: Literal["mini", "full"] = "full"

    def __init__(self, recipe: CoordinateDescent, model: nn.Module, loss: losses.Loss) -> None:
        super().__init__(model)
        self._recipe, self._loss = recipe, loss
        self._u: list[Tensor] = []
        self._v: list[Tensor] = []
        self._of_input: Tensor | None = None
        for layer in self._layers if recipe.spread else ():
            with torch.no_grad():
                layer.weight.mul_(recipe.spread / layer.weight.std())
                layer.bias.fill_(0.1)

    @torch.no_grad()
    def step(self, batch: Batch) -> Metrics:
        gamma, rho, alpha = self._recipe.gamma, self._recipe.rho, self._recipe.alpha
        if not self._u:
            self._start(batch.x)
        u, v, layers = self._u, self._v, self._layers  # v[i] goes into layer i, u[i] comes out of it
        last = len(layers) - 1
        wanted = F.one_hot(batch.y, u[last].shape[1]).to(u[last].dtype)
        v[last + 1] = (wanted + gamma * u[last] + alpha * v[last + 1]) / (1 + gamma + alpha)
        given = layers[last](v[last])
        u[last] = (gamma * v[last + 1] + rho * given) / (gamma + rho)
        self._fit(last)
        for i in reversed(range(last)):
            above = layers[i + 1]
            gram = rho * above.weight.T @ above.weight
            gram.diagonal().add_(gamma)
            right = rho * (u[i + 1] - above.bias) @ above.weight + gamma * u[i].relu()
            v[i + 1] = torch.cholesky_solve(right.T, torch.linalg.cholesky(gram)).T
            u[i] = self._behind_relu(v[i + 1], layers[i](v[i]), u[i])
            self._fit(i)
        return {"loss": self._loss(self.model(batch.x), batch.y)}

    def _start(self, x: Tensor) -> None:
        self._v = [self._front(x)]
        for number, layer in enumerate(self._layers):
            self._u.append(layer(self._v[-1]))
            self._v.append(self._u[-1].relu() if number < len(self._layers) - 1 else self._u[-1])

    def _behind_relu(self, v: Tensor, given: Tensor, before: Tensor) -> Tensor:
        """argmin over u of gamma/2 (v - relu(u))^2 + rho/2 (u - given)^2 + alpha/2 (u - before)^2."""
        gamma, rho, alpha = self._recipe.gamma, self._recipe.rho, self._recipe.alpha
        pulled = rho * given + alpha * before
        up, down = ((gamma * v + pulled) / (gamma + rho + alpha)).clamp_min(0), (pulled / (rho + alpha)).clamp_max(0)

        def cost(u: Tensor) -> Tensor:
            return gamma * (v - u.relu()).square() + rho * (u - given).square() + alpha * (u - before).square()

        return torch.where(cost(up) <= cost(down), up, down)

    def _fit(self, number: int) -> None:
        """The weights by least squares, near where they were; then the bias."""
        rho, alpha, layer, v = self._recipe.rho, self._recipe.alpha, self._layers[number], self._v[number]
        right = rho * v.T @ (self._u[number] - layer.bias) + alpha * layer.weight.T
        layer.weight.copy_(torch.cholesky_solve(right, self._factor(number)).T)
        error = (self._u[number] - F.linear(v, layer.weight)).sum(0)
        layer.bias.copy_((rho * error + alpha * layer.bias) / (rho * len(v) + alpha))

    def _factor(self, number: int) -> Tensor:
        """Of rho V^T V + alpha I; that of the network's input never changes."""
        if number == 0 and self._of_input is not None:
            return self._of_input
        gram = self._recipe.rho * self._v[number].T @ self._v[number]
        gram.diagonal().add_(self._recipe.alpha)
        factor = torch.linalg.cholesky(gram)
        if number == 0:
            self._of_input = factor
        return factor
