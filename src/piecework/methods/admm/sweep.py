"""The resynchronised sweep: closed-form directions, closed-form step, backtracked on the deployed network's loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ...group import Group
from ...losses import Loss
from ...solvers.linear import ridge_solve, solve_step
from ...training import Batch, CannotTrain, Metrics
from . import passes
from .crew import Crew
from .network import read
from .output import OutputLoss

if TYPE_CHECKING:
    from . import ADMM

PROJECTION_RIDGE = 1e-6
"""Relative ridge of the projection in the step length: only there to make a rank-deficient Gram matrix solvable."""
FIRST_REFITS = 4
"""Damped Newton moves of the output layer in the first step, for losses whose refit is no linear system."""
BACKTRACK = 0.25
GROW = 2.0
JUMP = 10.0
"""At an activation that jumps: the root mean square of a' - h(z), in the units of h, that the first sweep asks for."""
CALM = 0.7
"""What a sweep without a gain leaves of it."""


class _OtherRows(Exception):
    """A rank brought other rows: what was learnt of the old ones (Gram matrices, momentum) is void."""


class Resynchronised:
    """ADMM's default mode at work on one model. Between sweeps it keeps weights only, and no number a sample."""

    data: Literal["shard", "same"] = "shard"
    batches: Literal["mini", "full"] = "full"
    deterministic = True

    def __init__(self, method: ADMM, model: nn.Module, loss: Loss, group: Group) -> None:
        self.model, self.loss, self.group, self.method = model, loss, group, method
        self._network = read(model)
        self._weights = self._network.weights()
        for w in self._weights:
            group.broadcast_(w, 0)
        self._network.assign(self._weights)
        self._crew = Crew(
            self._network, gamma=method.gamma or 1.0, beta=method.beta, flips=method.flips, tile=method.tile
        )
        self._output = OutputLoss(loss, self._network.widths[-1], method.beta, self._weights[0].dtype)
        self._blind = self._blind_layers()
        self._momentum: list[Tensor | None] = [None] * len(self._weights)
        self._search, self._jump, self._scaled = 1.0, JUMP, False
        self._total: float | None = None
        self._rows = 0
        self._gram: Tensor | None = None
        self._input_gram: Tensor | None = None
        self._batch: tuple[int, int, int] | None = None
        self._other_rows = False
        self._held: Batch | None = None
        self._passes = self._trials = 0
        self._stalled = False
        """No step lowers the loss and the next sweep would be the same: it costs no pass and moves nothing."""
        self._reasons: set[str] = set()

    def _blind_layers(self) -> set[int]:
        """Hidden layers below a piecewise-constant activation: no tangent passes it, so their step is searched."""
        flat = [l for l, activation in enumerate(self._network.activations) if activation.piecewise_constant]
        return set(range(max(flat) + 1)) if flat else set()

    # -- the contract ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, batch: Batch) -> Metrics:
        """One sweep. The first one refits the output layer only: the start from which hidden layers are judged."""
        self._passes = self._trials = 0
        self._weights = self._network.weights()
        before = self._total
        self._meet(batch)
        first = before is None
        if self._stalled or self.group.size == 1:  # no message of this sweep would carry the news
            first = self.group.any(first or self._other_rows)
        with self._crew.at_work(batch):
            try:
                steps = self._first_fit(batch) if first else {} if self._stalled else self._sweep(batch)
            except _OtherRows:
                first, steps = True, self._first_fit(batch)
        self._network.assign(self._weights)
        assert self._total is not None
        figures = {
            "loss": self._total / self._rows,
            "passes": self._passes,
            "trials": self._trials,
            "accepted": float(first or before is None or self._total < before),
            "stalled": float(self._stalled),
            **{f"step_{l + 1}": s for l, s in steps.items()},
        }
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()}

    def sync(self) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        empty = torch.empty(0, dtype=torch.float64)
        return {
            "total": self._total,
            "rows": self._rows,
            "search": self._search,
            "jump": self._jump,
            "scaled": self._scaled,
            "stalled": self._stalled,
            "relax": [[l, factor] for l, factor in self._crew.relax.items()],
            "gram": empty if self._gram is None else self._gram,
            "momentum": [empty if p is None else p for p in self._momentum],
            "dual": empty if self._output.dual is None else self._output.dual,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self._crew.device
        self._total, self._rows, self._search = state["total"], state["rows"], state["search"]
        self._jump, self._scaled, self._stalled = state["jump"], state["scaled"], state["stalled"]
        self._crew.relax.update(dict(state["relax"]))
        self._gram = state["gram"].to(device) if state["gram"].numel() else None
        self._momentum = [p.to(device).clone() if p.numel() else None for p in state["momentum"]]
        self._output.dual = state["dual"].to(device).clone() if state["dual"].numel() else None
        self._batch, self._input_gram = None, None

    # -- the sweep ---------------------------------------------------------------------------------------------------

    def _meet(self, batch: Batch) -> None:
        """See whether the caller brings other rows than last time; `_other_rows` is this rank's word, not yet all's."""
        key = (batch.x.data_ptr(), batch.y.data_ptr(), len(batch))
        self._other_rows = self._batch is not None and self._batch != key
        self._batch, self._held = key, batch  # held, so that no other rows can take this address
        if self._other_rows and self._output.dual is not None:
            self._output.keep_dual(len(batch), self._crew.device)

    def _first_fit(self, batch: Batch) -> dict[int, float]:
        """Start afresh on these rows: fit the output layer and leave the hidden layers alone."""
        self._other_rows, self._stalled = False, False
        self._input_gram, self._gram = None, None
        self._momentum = [None] * len(self._weights)
        if self.method.multiplier:
            self._output.keep_dual(len(batch), self._crew.device)
        if self._output.exact:
            self._accept(*self._refit(batch, self._weights))
            self._stalled = len(self._weights) == 1  # solved
            return {}
        self._total = self._loss(batch, self._weights)
        last = len(self._weights) - 1
        for _ in range(FIRST_REFITS):
            before = self._total
            self._sweep(batch, only=last)
            if before - self._total < 0.02 * before:
                break
        self._momentum = [None] * len(self._weights)
        return {}

    def _sweep(self, batch: Batch, only: int | None = None) -> dict[int, float]:
        restarted = all(p is None for p in self._momentum)
        moves, searched, found = self._moves(batch, only)
        steps = self._steps(batch, moves, found) if moves else []
        applied: dict[int, Tensor] = {}
        for (l, direction), s in zip(moves, steps, strict=True):
            applied[l] = applied.get(l, torch.zeros_like(direction)) + s * direction
        for l, direction in searched:
            applied[l] = self._search * direction
        scale = 1.0
        for trial in range(self.method.max_trials):
            if self._try(batch, {l: scale * move for l, move in applied.items()}):
                self._search *= GROW if trial == 0 else scale
                break
            scale *= BACKTRACK
        else:
            self._search = 1.0
            self._jump *= CALM
            self._momentum = [None] * len(self._weights)
            self._stalled = restarted and only is None and not searched and self._output.dual is None
        taken = reversed(list(zip(moves, steps, strict=True)))  # the new moves stand first and win
        lengths = {l: scale * s for (l, _), s in taken}
        return lengths | {l: self._search for l, _ in searched}

    def _moves(
        self, batch: Batch, only: int | None
    ) -> tuple[list[tuple[int, Tensor]], list[tuple[int, Tensor]], passes.Directions]:
        """One pass and a solve a layer: the moves whose step has a closed form, and those whose step is searched."""
        last = len(self._weights) - 1
        skip = {0} if self._input_gram is not None else set()
        if self._output.exact:
            skip.add(last)
        if only is not None:
            skip |= set(range(last))
        gains = [] if only is not None else self._gains()
        found = self._directions(batch, gains, skip)
        if self._input_gram is None and found.grams[0] is not None and last > 0:
            self._input_gram = found.grams[0]
        layers = [l for l in range(last + 1) if (only is None or l == only) and not (l == last and self._output.exact)]
        moves: list[tuple[int, Tensor]] = []
        searched: list[tuple[int, Tensor]] = []
        for l in layers:
            gram = self._input_gram if l == 0 and last > 0 else found.grams[l]
            assert gram is not None
            direction = self._direction(l, gram, found.crosses[l]).to(self._weights[l].dtype)
            (searched if l in self._blind else moves).append((l, direction))
        if self.method.acceleration:
            moves += [(l, p) for l, _ in list(moves) if (p := self._momentum[l]) is not None]
        if not self._output.exact:
            self._gram = found.grams[last]
        return moves, searched, found

    def _directions(self, batch: Batch, gains: list[Tensor], skip: set[int]) -> passes.Directions:
        """The direction pass; at activations that jump, a' - h(z) is scaled so that JUMP times its root mean square is
        one. A first pass measures it, then every pass serves the next."""
        if gains and self._crew.relax and not self._scaled:
            skip_all = set(range(len(self._weights)))
            self._rescale(self._direction_pass(batch, gains, skip_all, move_dual=False).spread)
        found = self._direction_pass(batch, gains, skip)
        if gains:
            self._rescale(found.spread)
        return found

    def _direction_pass(
        self, batch: Batch, gains: list[Tensor], skip: set[int], *, move_dual: bool = True
    ) -> passes.Directions:
        """Raises _OtherRows on all ranks where any rank works on other rows than before."""
        found = passes.directions(
            self._crew, batch, self._weights, self._output, self.group,
            gains=gains, skip=skip, move_dual=move_dual, other_rows=self._other_rows,
        )  # fmt: skip
        self._passes += 1
        if found.other_rows:
            raise _OtherRows
        return found

    def _rescale(self, spread: dict[int, float]) -> None:
        for l, total in spread.items():
            mean = total / (self._rows * self._network.widths[l + 1])
            self._crew.relax[l] = self._jump / math.sqrt(mean) if mean > 0 else 1.0
        self._scaled = True

    def _direction(self, l: int, gram: Tensor, cross: Tensor) -> Tensor:
        """D_l = (sum of displacements x inputs)(Gram + ridge)^-1; of the output layer, the majorised Newton move."""
        if l < len(self._weights) - 1:
            return self._solve(gram, cross, self.method.ridge * gram.diagonal().mean().expand(len(gram)))
        ridge = self._output_ridge(gram)
        return self._solve(gram, cross / self._output.curvature - self._weights[l].double() * ridge, ridge)

    def _steps(self, batch: Batch, moves: list[tuple[int, Tensor]], found: passes.Directions) -> list[float]:
        """The step along each move that minimises the loss to second order, the output layer refitted with them."""
        line = passes.line(self._crew, batch, self._weights, self._output, self.group, moves=moves)
        self._passes += 1
        slope, curvature = line.slope, line.curvature
        assert self._gram is not None
        if line.inputs is not None:
            tiny = self._gram.diagonal() * PROJECTION_RIDGE + self._gram.diagonal().mean() * PROJECTION_RIDGE**2
            m, k, d = line.inputs.shape
            projected = ridge_solve(self._gram, line.inputs.reshape(m * k, d), tiny).x.view(m, k * d)
            slope = slope - projected @ found.crosses[-1].flatten()
            curvature = curvature - self._output.curvature * projected @ line.inputs.view(m, k * d).t()
        else:
            slope, curvature = self._add_ridge(moves, slope, curvature)
        return [float(s) for s in solve_step(curvature, slope).x]

    def _add_ridge(self, moves: list[tuple[int, Tensor]], slope: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
        assert self._gram is not None
        last = len(self._weights) - 1
        ridge = self._output.curvature * self._output_ridge(self._gram)
        mine = [(i, move.double()) for i, (l, move) in enumerate(moves) if l == last]
        for i, move in mine:
            slope[i] -= (ridge * self._weights[last].double() * move).sum()
            for j, other in mine:
                curvature[i, j] += (ridge * other * move).sum()
        return slope, curvature

    def _try(self, batch: Batch, applied: dict[int, Tensor]) -> bool:
        """One pass: the deployed loss with the moved weights (and the output layer refitted); kept if it falls."""
        weights = [w + applied[l] if l in applied else w for l, w in enumerate(self._weights)]
        self._trials += 1
        assert self._total is not None
        gram = self._gram
        if self._output.exact:
            total, gram, weights[-1] = self._refit(batch, weights)
        else:
            total = self._loss(batch, weights)
        if not total < self._total:
            return False
        for l, move in applied.items():
            self._momentum[l] = move if self.method.acceleration else None
        self._weights = weights
        self._total, self._gram = total, gram
        return True

    # -- closed forms ------------------------------------------------------------------------------------------------

    def _accept(self, total: float, gram: Tensor, output: Tensor) -> None:
        self._total, self._gram, self._weights[-1] = total, gram, output

    def _refit(self, batch: Batch, weights: list[Tensor]) -> tuple[float, Tensor, Tensor]:
        """One pass: the least-squares output layer at these hidden weights, and the total loss with it."""
        fit = passes.fit_output(self._crew, batch, weights, self._output, self.group)
        self._passes, self._rows = self._passes + 1, fit.rows
        output = self._solve(fit.gram, fit.cross, self._output_ridge(fit.gram)).to(weights[-1].dtype)
        w = output.double()
        total = fit.square - 2 * float((w * fit.cross).sum()) + float((w @ fit.gram * w).sum())
        return (total if math.isfinite(total) else math.inf), fit.gram, output

    def _loss(self, batch: Batch, weights: list[Tensor]) -> float:
        self._passes += 1
        total, self._rows = passes.total_loss(self._crew, batch, weights, self._output, self.group)
        return total if math.isfinite(total) else math.inf

    def _output_ridge(self, gram: Tensor) -> Tensor:
        """(d + 1,) of the output layer: relative to each unit's own mean square, so that the scale of a unit does not
        matter and none gains by growing; the bias is free."""
        ridge = gram.diagonal() * self.method.output_ridge
        floor = gram.diagonal().mean() * 1e-12
        if self._network.linears[-1].bias is not None:
            ridge = torch.cat([ridge[:-1], ridge.new_zeros(1)])
        return ridge + floor

    def _gains(self) -> list[Tensor]:
        """K = V^T (V V^T + gamma/beta I)^-1 of every layer above a hidden one, by a Cholesky of the smaller side."""
        ratio = (self.method.gamma or 1.0) / self.method.beta
        gains = []
        for l, w in enumerate(self._weights[1:]):
            v = w[:, : self._network.widths[l + 1]].double()
            wide = v.shape[0] <= v.shape[1]
            small = v @ v.t() if wide else v.t() @ v
            factor = torch.linalg.cholesky(small + ratio * torch.eye(len(small), dtype=v.dtype, device=v.device))
            solved = torch.cholesky_solve(v if wide else v.t(), factor)
            gains.append((solved.t() if wide else solved).to(w.dtype).contiguous())
        return gains

    def _solve(self, gram: Tensor, cross: Tensor, ridge: Tensor) -> Tensor:
        solved = ridge_solve(gram, cross, ridge)
        if solved.reason and solved.reason not in self._reasons:
            self._reasons.add(solved.reason)
            warnings.warn(solved.reason, stacklevel=2)
        return solved.x


def check_loss(loss: Loss) -> None:
    """Refuse a loss without what the sweep needs."""
    needs = ("prox", "gradient", "hessian_mv", "targets", "curvature_bound")
    missing = [name for name in needs if not hasattr(loss, name)]
    if missing:
        raise CannotTrain(
            f"ADMM needs a loss with {', '.join(needs)}; {type(loss).__name__} lacks {', '.join(missing)}: "
            "use squared, hinge, logistic or softmax"
        )
