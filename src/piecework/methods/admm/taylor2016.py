"""Algorithm 1 of Taylor et al. 2016 as published, misprints corrected; z and a of every sample are kept.

Samples are rows here. The published order, start and multiplier are kept on purpose, with their defects: the multiplier
acts on z_L alone and moves by beta, not 2 beta. The Gram matrices are summed over the ranks, and their pseudo-inverse
in float64 stands for a^+; this is the only place where one is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ...group import Group
from ...losses import Loss
from ...training import Batch, Metrics, stream
from .network import read

if TYPE_CHECKING:
    from . import ADMM


class Taylor2016:
    """Algorithm 1 at work on one model: a[l] (n, d_l) for l < L, z[l] (n, d_{l+1}) for l < L, dual (n, d_L)."""

    data: Literal["shard", "same"] = "shard"
    batches: Literal["mini", "full"] = "full"
    deterministic = True

    def __init__(self, method: ADMM, model: nn.Module, loss: Loss, group: Group) -> None:
        self.model, self.loss, self.group, self.method = model, loss, group, method
        self.gamma, self.beta = method.gamma or 10.0, method.beta
        self.network = read(model)
        self.weights = self.network.weights()
        for w in self.weights:
            group.broadcast_(w, 0)
        self.network.assign(self.weights)
        self._like = self.weights[0]
        self.a: list[Tensor] = []
        self.z: list[Tensor] = []
        self.dual = torch.empty(0)
        self.sweeps = 0

    @torch.no_grad()
    def step(self, batch: Batch) -> Metrics:
        """One sweep of Algorithm 1 over this rank's rows."""
        x = self.network.preparing(batch.x.to(self._like.device)).to(self._like.dtype)
        y = batch.y.to(self._like.device)
        if not self.z:
            self._start(x)
        self.a[0] = x
        if self.sweeps == 0:  # a_1 needs W_2 before the published order has computed it
            for l in range(len(self.weights)):
                self.update_w(l)
        for l in range(len(self.weights) - 1):
            self.update_w(l)
            self.update_a(l + 1)
            self.update_z(l)
        self.update_w(len(self.weights) - 1)
        self.update_output(y)
        if self.sweeps >= self.method.warm_sweeps:
            self.update_dual()
        self.sweeps += 1
        self.network.assign(self.weights)
        return self._figures(y)

    def _start(self, x: Tensor) -> None:
        """Gaussian a and z, the multiplier 0; a rank draws from a stream of its own."""
        n, widths = len(x), self.network.widths
        generator = stream(self.method.seed, self.group.rank)

        def gaussian(d: int) -> Tensor:
            return torch.randn(n, d, generator=generator, dtype=torch.float64).to(self._like)

        self.a = [x, *(gaussian(d) for d in widths[1:-1])]
        self.z = [gaussian(d) for d in widths[1:]]
        self.dual = torch.zeros(n, widths[-1], dtype=x.dtype, device=x.device)

    # -- the updates of Algorithm 1, in its order --------------------------------------------------------------------

    def inputs(self, l: int) -> Tensor:
        """a_l with a column of ones where layer l has a bias; the paper has none."""
        a = self.a[l]
        return a if self.network.linears[l].bias is None else torch.cat([a, a.new_ones(len(a), 1)], 1)

    def forward(self, l: int) -> Tensor:
        """W_l a_{l-1}."""
        return self.inputs(l) @ self.weights[l].t()

    def update_w(self, l: int) -> None:
        """W_l = z_l a_{l-1}^+ through the Gram matrix, so that ranks need only sum it."""
        a = self.inputs(l).double()
        gram, cross = a.t() @ a, self.z[l].double().t() @ a
        self.group.sum_(gram, cross)
        self.weights[l] = (cross @ torch.linalg.pinv(gram, hermitian=True)).to(self._like.dtype)

    def update_a(self, l: int) -> None:
        """a_l = (beta W^T W + gamma I)^-1 (beta W^T z_{l+1} + gamma h(z_l)), W of the layer above without its bias."""
        d = self.network.widths[l]
        v = self.weights[l][:, :d].double()
        z = self.z[l].double()
        if self.network.linears[l].bias is not None:
            z = z - self.weights[l][:, -1].double()
        right = self.beta * z @ v + self.gamma * self._active(l - 1).double()
        system = self.beta * v.t() @ v + self.gamma * torch.eye(d, dtype=v.dtype, device=v.device)
        self.a[l] = torch.cholesky_solve(right.t(), torch.linalg.cholesky(system)).t().to(self._like.dtype)

    def _active(self, l: int) -> Tensor:
        return self.network.activations[l].forward(self.z[l])

    def update_z(self, l: int) -> None:
        self.z[l] = self.network.activations[l].z_update(self.a[l + 1], self.forward(l), self.gamma, self.beta)

    def update_output(self, y: Tensor) -> None:
        self.z[-1] = self.loss.prox(self.forward(len(self.weights) - 1), y, self.beta, self.dual)

    def update_dual(self) -> None:
        """lambda += beta (z_L - W_L a_{L-1}); the exact step for un-halved penalties would be 2 beta."""
        self.dual += self.beta * (self.z[-1] - self.forward(len(self.weights) - 1))

    def objective(self, y: Tensor) -> Tensor:
        """Objective (5) over this rank's rows, (1,) float64."""
        total = self.loss.total(self.z[-1], y) + (self.z[-1].double() * self.dual.double()).sum()
        for l in range(len(self.weights)):
            total = total + self.beta * (self.z[l] - self.forward(l)).double().square().sum()
        for l in range(len(self.weights) - 1):
            total = total + self.gamma * (self.a[l + 1] - self._active(l)).double().square().sum()
        return total.reshape(1)

    # -- reports -----------------------------------------------------------------------------------------------------

    def _figures(self, y: Tensor) -> Metrics:
        """The deployed network's loss, and under their own names what the relaxed variables say.

        `augmented` is objective (5) a sample, `relaxed_loss` the loss of the stored z_L, the gaps are relative."""
        z = self.a[0]
        for l, w in enumerate(self.weights):
            bias = self.network.linears[l].bias is not None
            d = self.network.widths[l]
            z = z @ w[:, :d].t() + (w[:, -1] if bias else 0)
            if l < len(self.weights) - 1:
                z = self.network.activations[l].forward(z)
        sums = [self.loss.total(z, y).reshape(1), self.objective(y), self.loss.total(self.z[-1], y).reshape(1)]
        hidden = range(len(self.weights) - 1)
        sums += [self._square(self.a[l + 1] - self._active(l) for l in hidden)]
        sums += [self._square(self.a[l + 1] for l in hidden)]
        sums += [self._square(self.z[l] - self.forward(l) for l in range(len(self.weights)))]
        sums += [self._square(self.z)]
        flat = torch.cat([*sums, torch.tensor([float(len(y))], dtype=torch.float64, device=y.device)])
        self.group.sum_(flat)
        loss, augmented, relaxed, gap_a, a, gap_z, z_square, rows = flat.unbind()
        return {
            "loss": loss / rows,
            "augmented": augmented / rows,
            "relaxed_loss": relaxed / rows,
            "gap_a": (gap_a / a.clamp_min(1e-300)).sqrt(),
            "gap_z": (gap_z / z_square.clamp_min(1e-300)).sqrt(),
        }

    def _square(self, tensors: Any) -> Tensor:
        total = torch.zeros(1, dtype=torch.float64, device=self._like.device)
        for t in tensors:
            total += t.double().square().sum()
        return total

    # -- the contract ------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"a": self.a[1:], "z": self.z, "dual": self.dual, "sweeps": self.sweeps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self._like.device
        self.sweeps = state["sweeps"]
        self.z = [z.to(device).clone() for z in state["z"]]
        self.a = [torch.empty(0), *(a.to(device).clone() for a in state["a"])] if self.z else []
        self.dual = state["dual"].to(device).clone()
        self.weights = self.network.weights()
