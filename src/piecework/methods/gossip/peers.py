"""A rank's optimiser among peers: what happens before and after each of its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...group import Group
from ...ranks.survivors import Survivors
from ...training import Metrics
from ..parameters import share_from_rank_0
from .outer import SlowMomentum
from .push_sum import PushSum
from .tracking import Tracker

if TYPE_CHECKING:
    from . import Gossip


class Peers:
    """Gossip around one optimiser: `before` and `after` each step; `sync` for the average of all ranks.

    Between steps the parameters hold this rank's own estimate, except after `sync`, when they hold the average until
    the next step or `resume`."""

    def __init__(
        self,
        recipe: Gossip,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[Tensor],
        group: Group,
    ) -> None:
        self.model, self.group = model, group
        self._recipe, self._optimizer, self._parameters = recipe, optimizer, list(parameters)
        self._tracker = Tracker(self._parameters) if recipe.tracking else None
        self.push_sum = PushSum(
            self._parameters,
            group,
            recipe.graph,
            carried=self._tracker.tensors if self._tracker else (),
            every=recipe.every,
            overlap=recipe.overlap,
            on_time=recipe.on_time,
            wire=torch.bfloat16 if recipe.wire == "bfloat16" else None,
            biased=not recipe.push_weight,
        )
        self._slow = (
            SlowMomentum(self._parameters, momentum=recipe.slow_momentum, lr=recipe.slow_lr)
            if recipe.slow_every
            else None
        )
        self._own: list[Tensor] | None = None  # this rank's estimate and buffers, while the model holds the average
        self._before: list[Tensor] = []
        self.words: dict[str, Any] = {}
        if isinstance(group, Survivors):
            group.evidence = self.push_sum.dead
            if group.fresh:
                self._begin_with_newcomers()

    def leave(self) -> None:
        """Give all mass to another rank, and mix no more."""
        self.resume()
        self.push_sum.leave()

    def admit(self, refuse: Callable[[Any], str | None]) -> int:
        """Let newcomers in; returns how many. Collective."""
        self.resume()
        came = self.group.admit(refuse) if isinstance(self.group, Survivors) else 0
        if came:
            self._begin_with_newcomers()
        return came

    @torch.no_grad()
    def _begin_with_newcomers(self) -> None:
        """A newcomer begins with the running statistics and the outer momentum of rank 0; the others keep theirs."""
        fresh = isinstance(self.group, Survivors) and self.group.fresh
        self.push_sum.drain()
        given = [*self._buffers(), *(self._slow.tensors if self._slow is not None else ())]
        own = [tensor.detach().clone() for tensor in given]
        share_from_rank_0(given, self.group)
        if given and not fresh:
            torch._foreach_copy_(given, own)
        self._share_what_is_not_averaged()
        if isinstance(self.group, Survivors):
            self.group.fresh = False

    def before(self) -> None:
        """Just before the optimiser's step, when the gradients at z are there."""
        assert self._own is None, "resume() comes before the forward pass"
        weight = self.push_sum.weight
        if self._tracker is not None and weight > 0:
            self._tracker.replace_gradients(1.0 / weight if self._recipe.step_on == "z" else 1.0)
        if weight == 0.0:  # nothing has been pushed to this rank yet: it cannot move
            self._before = [parameter.detach().clone() for parameter in self._parameters]
        elif self._recipe.step_on == "x":
            self.push_sum.estimates_to_numerators()

    @torch.no_grad()
    def after(self) -> Metrics:
        """Just after it: mix, and every so often take the outer step."""
        weight = self.push_sum.weight
        if weight == 0.0:
            torch._foreach_copy_(self._parameters, self._before)
        self.push_sum.mix(numerators=weight > 0 and self._recipe.step_on == "x")
        if self._slow is not None and self.push_sum.step % self._recipe.slow_every == 0:
            self._outer_step(self._slow)
        found = {
            "push_weight": torch.tensor(self.push_sum.weight, dtype=torch.float64),
            "blocked_seconds": torch.tensor(self.push_sum.blocked_seconds, dtype=torch.float64),
        }
        self.push_sum.blocked_seconds = 0.0
        if ages := self.push_sum.ages:
            found["late"] = torch.tensor(sum(ages) / len(ages), dtype=torch.float64)
        return found

    def _outer_step(self, slow: SlowMomentum) -> None:
        rate = float(self._optimizer.param_groups[0]["lr"])
        if not self._recipe.slow_average:
            moved = slow.moved(self._parameters, rate)
            torch._foreach_copy_(self._parameters, moved)
            return
        estimates, carried, _ = self.push_sum.average()
        self.push_sum.begin_again(slow.moved(estimates, rate), [one / self.group.size for one in carried])
        for state in self._optimizer.state.values():
            if (momentum := state.get("momentum_buffer")) is not None:
                momentum.zero_()

    @torch.no_grad()
    def sync(self) -> None:
        """The average of all ranks into the model, of running statistics too. Collective."""
        self.resume()
        held = [*self._parameters, *self._buffers()]
        estimates, _, weight = self.push_sum.average()
        own = [tensor.detach().clone() for tensor in held]  # only now: after a death the average is preceded by repairs
        statistics = [buffer.detach().clone() for buffer in self._buffers()]
        self.group.sum_(*statistics)
        statistics = [total / self.group.size for total in statistics]
        torch._foreach_copy_(held, [*estimates, *statistics])
        self._share_what_is_not_averaged()
        self.words = {"consensus_distance": self._distance(own, estimates), "weight_sum": weight}
        self._own = own

    def _share_what_is_not_averaged(self) -> None:
        averaged = set(map(id, self._parameters))
        rest = [one for one in self.model.parameters() if id(one) not in averaged]
        counters = [buffer for buffer in self.model.buffers() if not buffer.is_floating_point()]
        share_from_rank_0(chain(rest, counters), self.group)

    def _distance(self, own: Sequence[Tensor], mean: Sequence[Tensor]) -> float:
        """How far this rank's estimate is from the average, root mean square over ranks, in lengths of the average."""
        pairs = list(zip(own, mean, strict=False))
        apart = sum((one.double() - other.double()).square().sum().cpu() for one, other in pairs)
        length = sum(other.double().square().sum().cpu() for _, other in pairs)
        total = torch.stack([torch.as_tensor(apart)])
        self.group.sum_(total)
        return float((total[0] / self.group.size / torch.as_tensor(length).clamp_min(1e-300)).sqrt())

    @torch.no_grad()
    def resume(self) -> None:
        """This rank's own estimate back into the model, where it holds the average."""
        if self._own is not None:
            torch._foreach_copy_([*self._parameters, *self._buffers()], self._own)
            self._own = None

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs to go on, with the messages that are under way to it. Collective."""
        with self._own_in_place():
            return {
                "push_sum": self.push_sum.state_dict(),
                "buffers": [buffer.detach().clone() for buffer in self._buffers()],
                "slow": {} if self._slow is None else self._slow.state_dict(),
                "tracker": {} if self._tracker is None else self._tracker.state_dict(),
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, with this rank's own estimate in the model."""
        self._own = None
        self.push_sum.load_state_dict(state["push_sum"])
        for buffer, found in zip(self._buffers(), state["buffers"], strict=True):
            buffer.copy_(found)
        if self._slow is not None:
            self._slow.load_state_dict(state["slow"])
        if self._tracker is not None:
            self._tracker.load_state_dict(state["tracker"])

    @contextmanager
    def _own_in_place(self) -> Iterator[None]:
        """What this rank trains on in the model, for as long as this lasts."""
        held, own = [*self._parameters, *self._buffers()], self._own
        average = [tensor.detach().clone() for tensor in held] if own is not None else []
        self.resume()
        yield
        if own is not None:
            with torch.no_grad():
                torch._foreach_copy_(held, average)
            self._own = own

    def _buffers(self) -> list[Tensor]:
        """Running statistics: each rank's own, averaged at evaluations."""
        return [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
