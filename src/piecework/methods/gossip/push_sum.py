"""Push-sum on tensors: every rank gives shares of its numerators and of its weight away, and adds what comes in.

A rank holds numerators x and a weight w; z = x / w is its estimate of the mean. What leaves one rank arrives at
another, so the sums of x and of w over all ranks and all that is under way never change. In the tensors lies z: where w
is 1, as it is without overlap on the graphs of this package, nothing is divided.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...group import Group
from ...ranks.mailbox import Letter, Mailbox
from ...ranks.survivors import Survivors
from .graphs import Graph, Links
from .message import Layout, Mass

_FAREWELL = -1
"""In the place of a step: nothing more comes from this peer."""


class PushSum:
    """One rank's part. `mix` is called once a step, after the tensors have moved.

    tensors: estimates z; carried: numerators that are never divided (of a gradient that is tracked).
    every: steps between two sends; overlap: steps that a message may be late; on_time: use it exactly that late, and so
    the same bits each time; otherwise as soon as it is there. biased: leave the weight at 1, which is wrong and there
    to show it."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        group: Group,
        graph: str | Graph,
        *,
        carried: Sequence[Tensor] = (),
        every: int = 1,
        overlap: int = 0,
        on_time: bool = False,
        wire: torch.dtype | None = None,
        biased: bool = False,
    ) -> None:
        self.tensors, self.carried, self.group = tensors, carried, group
        self.weight = 1.0
        self.step = 0
        """Steps that this rank has done."""
        self.blocked_seconds = 0.0
        """Spent in waiting for messages, since this was last set to 0."""
        self.ages: list[int] = []
        """How many steps old each message was that the last `mix` added."""
        self._every, self._overlap, self._on_time = every, overlap, on_time or overlap == 0
        self._biased = biased
        self._wire = wire
        self._graph = graph
        self._seconds: Callable[[], float] = getattr(group, "seconds", time.perf_counter)  # of ranks on a clock
        self._layout = Layout([*tensors, *carried], wire)
        self._mailbox: Mailbox | None = None
        self._arrived: list[Mass] = []
        self._last = dict.fromkeys(range(group.size), -1)  # the newest step of which a peer's message is here
        if getattr(group, "fresh", False):  # it has no mass, and learns in `drain` where the others are
            self.weight, self.step, self._epoch = 0.0, -1, -1
        else:
            self._connect()

    def _connect(self) -> None:
        """A mailbox, and the graph, of the ranks that are there now."""
        group = self.group
        self._epoch = getattr(group, "epoch", 0)
        self._names = getattr(group, "names", tuple(range(group.size)))
        self._links = Links(self._graph, group.rank, group.size)
        self._mailbox = group.mailbox(self._layout.length) if group.size > 1 else None
        self._due: dict[int, int] = {}  # the newest step of which a peer's message must be here
        self._released: set[int] = set()  # peers that leave: nothing more goes to them
        self._farewells: set[int] = set()  # peers that will send nothing more to this rank, which leaves
        self._sources: set[int] = set()  # peers whose messages are taken
        self._listen(self._links.sources(0))

    def dead(self) -> list[int]:
        """The names of the ranks that this one knows to be gone, or to leave."""
        if self._mailbox is None:
            return []
        self._release()
        return [self._names[peer] for peer in self._mailbox.gone | self._released]

    @torch.no_grad()
    def mix(self, *, numerators: bool = False) -> None:
        """Send shares of x, where this step sends; add what is due, and what else is there; leave z in the tensors.

        numerators: x is in the tensors already, as it is after an optimiser that has stepped on it."""
        if self._mailbox is None:
            if numerators:
                self.numerators_to_estimates()
        else:
            held = [tensor.detach().clone() for tensor in self.tensors] if self.weight == 0.0 else None
            if not numerators:
                self.estimates_to_numerators()
            sent = self._send() if self.step % self._every == 0 else _Sent(1.0, 1.0, 0, 0.0)
            self._wait(self._due_now())
            self._add(sent, self._chosen())
            self.numerators_to_estimates()
            if held is not None and self.weight == 0.0:  # it has joined, and nobody has sent to it yet
                torch._foreach_copy_(list(self.tensors), held)
        self.step += 1

    @torch.no_grad()
    def estimates_to_numerators(self) -> None:
        """Put x where z was, before an optimiser steps on it."""
        if self.weight != 1.0:
            torch._foreach_mul_(list(self.tensors), self.weight)

    @torch.no_grad()
    def numerators_to_estimates(self) -> None:
        """Put z where x was, where there is a weight."""
        if self.weight not in (0.0, 1.0):
            torch._foreach_div_(list(self.tensors), self.weight)

    @torch.no_grad()
    def average(self) -> tuple[list[Tensor], list[Tensor], float]:
        """The mean of x over ranks and messages, of z's kind; the sums of what is carried; and the sum of the weights.

        Collective; nothing is moved by it: messages are waited for, and added when they would have been."""
        self.drain()
        numerators = [tensor.detach() * self.weight for tensor in self.tensors]
        carried = [tensor.detach().clone() for tensor in self.carried]
        layout = Layout([*numerators, *carried], self._wire)
        arrived = sorted(self._arrived, key=Mass.order)
        for mass in arrived:
            layout.add_to_tensors(mass.letter.content, 1.0)
        under_way = 0.0 if self._biased else sum(mass.weight for mass in arrived)
        weight = torch.tensor(self.weight + under_way, dtype=torch.float64)
        self.group.sum_(*numerators, *carried, weight)
        return [tensor.div_(float(weight)) for tensor in numerators], carried, float(weight)

    @torch.no_grad()
    def begin_again(self, estimates: Sequence[Tensor], carried: Sequence[Tensor]) -> None:
        """Take these for z and for what is carried, with weight 1; what has arrived is in them already."""
        torch._foreach_copy_([*self.tensors, *self.carried], [*estimates, *carried])
        self.weight = 1.0
        for mass in self._arrived:
            assert self._mailbox is not None
            self._mailbox.recycle(mass.letter)
        self._arrived = []

    def drain(self) -> list[int]:
        """Wait until all that was posted to this rank is here; returns the ranks' numbers of steps. Collective."""
        steps = [int(step) for step in self.group.gather(torch.tensor(self.step))]
        if self._mailbox is not None:
            names = getattr(self.group, "names", self._names)
            pairs = zip(names, steps, strict=True)
            done = {self._names.index(name): number for name, number in pairs if name in self._names}
            own = self._names.index(names[self.group.rank])
            due = {peer: self._newest(peer, number) for peer, number in done.items() if peer != own}
            self._listen(peer for peer, step in due.items() if step >= 0)
            self._wait(due)
            while departing := self._released - self._mailbox.gone:  # one of them may give this rank all that it has
                self._mailbox.wait(departing)
                self._collect()
        if getattr(self.group, "epoch", 0) != self._epoch:
            self._go_on_with_those_left(steps)
            return self.drain()
        return steps

    def _go_on_with_those_left(self, steps: Sequence[int]) -> None:
        """After others have gone or come: add what is here, bring the sum of the weights to as many as there are now,
        and begin a new graph of them.

        steps: those of the ranks that are there. Estimates stay as they are, but for what is added."""
        if self._mailbox is not None:
            self._add_all()
        weight = torch.tensor(self.weight, dtype=torch.float64)
        self.group.sum_(weight)
        factor = self.group.size / float(weight)
        self.weight *= factor
        for tensor in self.carried:
            tensor.mul_(factor)
        if self._mailbox is not None:
            self._mailbox.close()
        self._connect()
        newest = max(steps)
        self._last = {peer: (number if number >= 0 else newest) - 1 for peer, number in enumerate(steps)}
        if self.step < 0:
            self.step = newest

    @torch.no_grad()
    def leave(self) -> None:
        """Give all mass to another rank, when all others have said that nothing more is under way to this one."""
        mailbox = self._mailbox
        if mailbox is None:
            return
        others = {peer for peer in range(len(self._names)) if peer != self._links.rank}
        mailbox.listen(others)
        mailbox.announce()
        if isinstance(self.group, Survivors):
            self.group.hang_up()
        while waiting := others - self._farewells - mailbox.gone:
            mailbox.wait(waiting)
            self._collect()
        self._collect()
        self._add_all()
        self.estimates_to_numerators()
        if heirs := sorted(others - mailbox.gone - self._released):
            self._give_all(mailbox, next((peer for peer in heirs if peer > self._links.rank), heirs[0]))
        self.numerators_to_estimates()
        mailbox.close(alone=True)
        self._mailbox, self.weight = None, 0.0

    def _add_all(self) -> None:
        """Whatever is here, however late it was to be used."""
        self.estimates_to_numerators()
        self._add(_Sent(1.0, 1.0, 0, 0.0), sorted(self._arrived, key=Mass.order))
        self._arrived = []
        self.numerators_to_estimates()

    def _give_all(self, mailbox: Mailbox, heir: int) -> None:
        """Post x and w, whole: on a narrow wire in several letters, each with what rounding left of those before."""
        rest = [tensor.detach().clone() for tensor in [*self.tensors, *self.carried]]
        layout, weight = Layout(rest, self._wire), self.weight
        while True:
            draft = mailbox.draft()
            layout.write(draft, self.step, weight, 1.0)
            layout.add_to_tensors(draft, -1.0)
            mailbox.post(heir, draft, layout.length)
            weight = 0.0
            if not any(bool(tensor.any()) for tensor in rest):
                return

    def state_dict(self) -> dict[str, Any]:
        """This rank's part, with the messages that it has not added yet. Collective."""
        steps = self.drain()
        return {
            "step": self.step,
            "weight": self.weight,
            "tensors": [tensor.detach().clone() for tensor in self.tensors],
            "carried": [tensor.detach().clone() for tensor in self.carried],
            "arrived": [[mass.source, mass.letter.content.clone()] for mass in self._arrived],
            "steps": steps,
            "sources": sorted(self._sources),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same rank of as many ranks, before the first step."""
        for own, found in zip([*self.tensors, *self.carried], [*state["tensors"], *state["carried"]], strict=True):
            own.copy_(found)
        self.step, self.weight = int(state["step"]), float(state["weight"])
        letters = [Letter(int(peer), content.clone(), content) for peer, content in state["arrived"]]
        self._arrived = [self._layout.read(letter) for letter in letters]
        self._last = {peer: int(steps) - 1 for peer, steps in enumerate(state["steps"])}
        self._listen(int(peer) for peer in state["sources"])

    def _send(self) -> _Sent:
        """Post shares of x, which is in the tensors."""
        assert self._mailbox is not None
        round = self.step // self._every
        sources, gone = self._links.sources(round), self._mailbox.gone | self._released
        self._listen(sources)
        out = {peer: share for peer, share in self._links.out(round).items() if peer not in gone}
        drafts = {peer: self._mailbox.draft() for peer in out}
        for peer, share in out.items():
            self._layout.write(drafts[peer], self.step, share * self.weight, share)
        kept = 1.0 - sum(out.values())
        if self._layout.rounds:  # what rounding took from a message stays here
            for draft in drafts.values():
                self._layout.add_to_tensors(draft, -1.0)
        for peer, draft in drafts.items():
            self._mailbox.post(peer, draft, self._layout.length)
        even = len(set(out.values())) == 1 and len(out) == len(sources) and self.weight == 1.0
        return _Sent(
            1.0 if self._layout.rounds else kept, kept, len(out) if even else 0, max(out.values(), default=0.0)
        )

    def _listen(self, peers: Iterable[int]) -> None:
        if self._mailbox is not None:
            new = set(peers) - self._sources
            self._sources |= new
            self._mailbox.listen(sorted(new))

    def _due_now(self) -> Mapping[int, int]:
        due = self.step - self._overlap
        if due >= 0 and due % self._every == 0:
            self._due |= dict.fromkeys(self._links.sources(due // self._every), due)
        return self._due

    def _newest(self, peer: int, steps: int) -> int:
        """The newest step before `steps` of which a message of a peer is under way to this rank; -1 for none."""
        for step in range(steps - 1, self._last[peer], -1):
            if step % self._every == 0 and peer in self._links.sources(step // self._every):
                return step
        return -1

    def _wait(self, due: Mapping[int, int]) -> None:
        """Until the messages of these steps, and so all before them, are here, or their senders gone."""
        assert self._mailbox is not None
        self._collect()
        while missing := [peer for peer, step in due.items() if self._last[peer] < step]:
            gone = self._mailbox.gone
            self._collect()  # only now: who was gone before has nothing more to come
            missing = [peer for peer in missing if self._last[peer] < due[peer] and peer not in gone]
            if not missing:
                break
            began = self._seconds()
            self._mailbox.wait(missing)
            self.blocked_seconds += self._seconds() - began

    def _collect(self) -> None:
        assert self._mailbox is not None
        self._release()
        for letter in self._mailbox.take():
            mass = self._layout.read(letter)
            if mass.step == _FAREWELL:
                self._farewells.add(mass.source)
                self._mailbox.recycle(letter)
            else:
                self._last[mass.source] = mass.step
                self._arrived.append(mass)

    def _release(self) -> None:
        """Tell those who leave that what they have had from this rank was all, and take what they still give."""
        assert self._mailbox is not None
        for peer in self._mailbox.leaving - self._released:
            self._released.add(peer)
            self._mailbox.listen([peer])
            draft = self._mailbox.draft()
            self._mailbox.post(peer, draft, self._layout.write_head(draft, _FAREWELL, 0.0))

    def _chosen(self) -> list[Mass]:
        """What this step adds, in an order that does not depend on arrival."""
        due = self.step - self._overlap
        chosen = [mass for mass in self._arrived if mass.step <= due or not self._on_time]
        self._arrived = [mass for mass in self._arrived if mass.step > due and self._on_time]
        return sorted(chosen, key=Mass.order)

    def _add(self, sent: _Sent, chosen: Sequence[Mass]) -> None:
        """x <- what was kept of x + what has come + what came back; w likewise."""
        assert self._mailbox is not None
        back = [self._layout.read(letter) for letter in self._mailbox.returned()]
        if sent.kept != 1.0:
            torch._foreach_mul_([*self.tensors, *self.carried], sent.kept)
        for mass in [*chosen, *back]:
            self._layout.add_to_tensors(mass.letter.content, 1.0)
            self._mailbox.recycle(mass.letter)
        weights = [mass.weight for mass in [*chosen, *back]]
        # A round of equal shares of weights that are 1 leaves 1, whatever rounding makes of it.
        even = len(weights) == sent.even > 0 and all(abs(weight - sent.share) < 1e-12 for weight in weights)
        if not self._biased:
            self.weight = 1.0 if even else self.weight * sent.kept_weight + sum(weights)
        self.ages = [self.step - mass.step for mass in chosen]


@dataclass(frozen=True)
class _Sent:
    """What a rank did in its part of a round: the part of x and of w that is left to it; to how many peers it gave
    equal shares of a weight of 1 while as many gave to it (else 0), and that share."""

    kept: float
    kept_weight: float
    even: int
    share: float
