"""Blocks with losses of their own at work: the blocks of this rank, mini-batch by mini-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ...evaluation import device_of
from ...group import Group
from ...losses import Loss, smoothed
from ...training import BadInput, Batch, CannotTrain, Metrics
from ..alike import notes_of, require_alike
from ..blocks import Block, one_row, owners
from ..optimizer_state import entries_of, put_entries
from ..parameters import share_from, start_from_rank_0
from ..schedule import set_rate
from .credit import Credit, Routes, credit, first_reach, grown, routes
from .cuts import cut
from .exits import exits_of
from .head import Head
from .heads import Site, head
from .links import Links
from .probe import true_gradients
from .stage import Stage

if TYPE_CHECKING:
    from . import Local

Key = tuple[int, int]
"""(loss, step of the mini-batch)."""


class LocalAtWork:
    """The blocks of this rank. matrix: in place of the coupling of the recipe, any upper triangular one."""

    data: Literal["shard", "same"] = "same"
    batches: Literal["mini", "full"] = "mini"
    deterministic = True

    def __init__(
        self, recipe: Local, model: nn.Module, loss: Loss, group: Group, *, matrix: Credit | None = None
    ) -> None:
        self.model, self.group = model, group
        self._recipe, self._loss, self._objective = recipe, loss, smoothed(loss, recipe.label_smoothing)
        self._parts = cut(model, at=recipe.at, blocks=recipe.blocks)
        self._owners = _share_out(self._parts, group.size)
        mine = [number for number, rank in enumerate(self._owners) if rank == group.rank]
        self._device = device_of(model)
        require_alike("local", notes_of(recipe, model), group)  # messages have no header: both ends know their length
        start_from_rank_0(model, group)
        self._factories = recipe.factories(len(self._parts))
        self.stages = [
            Stage(Block(self._parts[one], one, self._factories[one], recipe.seed, self._device)) for one in mine
        ]
        self._learning = [any(one.requires_grad for one in part.parameters()) for part in self._parts]
        self._matrix, self._reach = matrix, 0
        if not routes(self._credits(self._reach_at(0)), self._learning).used[-1]:
            raise CannotTrain(
                "no block would learn from the loss of the model itself, because its last block has nothing to train; "
                "cut before the last layer with weights (at=), or unfreeze it"
            )
        self._routes: Routes | None = None
        self._links = Links(group, buffers=recipe.buffers, staleness=recipe.staleness)
        self._inbox: dict[int, dict[Key, Tensor]] = {stage.number: {} for stage in self.stages}
        self._sites: list[Site] | None = None
        self._known: tuple[torch.Size, torch.dtype] | None = None
        self._step = 0

    # -- the contract -------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> Metrics:
        if len(batch) == 0:
            raise BadInput("a mini-batch has no rows; give every rank the same number, at least one")
        if not self.model.training:
            self.model.train()
        batch = Batch(batch.x.to(self._device), batch.y.to(self._device), batch.index)
        self._meet(batch.x)
        self._couple()
        lr = self._set_rate()
        self._links.note(batch.y)
        true = None
        if self._recipe.probe_every and self._step % self._recipe.probe_every == 0:
            self._settle()
            blocks = [stage.block for stage in self.stages]
            assert self._sites is not None
            true = true_gradients(blocks, self._links, self._sites, batch, self._objective, self._step, self._learning)
        metrics = self._advance(batch, true or {})
        self._step += 1
        for stage in self.stages:
            if stage.cosine is not None:
                metrics[f"cosine_{stage.number}"], stage.cosine = stage.cosine, None
        return metrics if lr is None else {**metrics, "lr": torch.tensor(lr, dtype=torch.float64)}

    def sync(self) -> None:
        """Each rank gets the blocks of the others. Raises BadInput where ranks were given different labels."""
        self._settle()
        self._links.compare()
        self._share(self._parts)

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        sites = self._sites
        return {
            "step": self._step,
            "blocks": len(self._parts),
            "optimizers": {
                str(stage.number): entries_of(stage.block.optimizer, stage.block.parameters)
                for stage in self.stages
                if stage.block.optimizer is not None
            },
            "rows": None if sites is None else [sites[0].x.clone(), *(site.h.clone() for site in sites)],
            "heads": {str(stage.number): _head_state(stage.head) for stage in self.stages if stage.head is not None},
            "flights": {str(stage.number): stage.state_dict() for stage in self.stages},
            "inbox": {
                str(number): [[loss, step, one.clone()] for (loss, step), one in inbox.items()]
                for number, inbox in self._inbox.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["blocks"] != len(self._parts):
            raise BadInput(f"the state is of {state['blocks']} blocks, and this model is cut into {len(self._parts)}")
        self._step = int(state["step"])
        for stage in self.stages:
            if stage.block.optimizer is not None:
                entries = list(state["optimizers"][str(stage.number)])
                put_entries(stage.block.optimizer, stage.block.parameters, entries)
        if state["rows"] is not None:
            x, *rows = state["rows"]
            self._place(x.to(self._device), [row.to(self._device) for row in rows])
        for stage in self.stages:
            if stage.head is not None:
                _put_head_state(stage.head, state["heads"][str(stage.number)])
        if state["rows"] is not None and self._step > 0:
            self._couple(self._step - 1)
        for stage in self.stages:
            stage.load_state_dict(state["flights"][str(stage.number)])
            kept = state["inbox"][str(stage.number)]
            self._inbox[stage.number] = {(int(loss), int(step)): one for loss, step, one in kept}

    def exits(self) -> list[nn.Sequential]:
        """A network for each block, as it would be deployed: the blocks up to it, and its head; the last is the model.

        Each is `nn.Sequential(blocks, head)`, in evaluation mode. They are copies, which share what they have in common
        with each other and nothing with the training; `piecework.nn.EarlyExit` puts them to use. Collective: every
        rank gets all of them. Raises BadInput before the first step, and where a head rests or gives no outputs."""
        self.sync()
        if self._sites is None or self._routes is None:
            raise BadInput("there are no exits before the first step: heads are made when the first rows are seen")
        return exits_of(self._parts, self._heads_of_all(), self._routes.used, every=self._recipe.every_head)

    # -- a mini-batch -------------------------------------------------------------------------------------------------

    def _advance(self, batch: Batch, true: Mapping[int, list[Tensor]]) -> Metrics:
        metrics: Metrics = {}
        step, late, h = self._step, self._recipe.staleness, batch.x
        assert self._routes is not None
        assert self._sites is not None
        if self.stages[0].number > 0:
            h = self._links.from_below(self._sites[self.stages[0].number - 1].h, len(batch), step)
        for place, stage in enumerate(self.stages):
            h = stage.forward(step, h)
            if step in stage.flights and stage.number in true:
                stage.flights[step].true = true[stage.number]
            if place == len(self.stages) - 1 and stage.number < len(self._parts) - 1:
                self._links.up(h)
            cotangent = self._judge(stage, h, batch, metrics)
            if cotangent is not None:
                self._credit(place, (stage.number, step), cotangent)
            for key in self._due(stage.number, step) if late else ():
                self._credit(place, key, self._from_above(stage, key))
        top = self.stages[-1]
        for key in () if late else self._due(top.number, step):
            self._credit(len(self.stages) - 1, key, self._from_above(top, key))
        return metrics

    def _judge(self, stage: Stage, h: Tensor, batch: Batch, metrics: Metrics) -> Tensor | None:
        """The derivative of the block's own loss at its output, where a block learns from it."""
        assert self._routes is not None
        number, used = stage.number, self._routes.used[stage.number]
        if stage.number == len(self._parts) - 1:
            return self._judge_last(h, batch, metrics, used=used)
        if stage.head is None or not (used or self._recipe.every_head):
            return None
        loss, cotangent = stage.head.judge(h, batch, self._objective, self._step, wanted=used)
        metrics[f"local_loss_{number}"] = loss
        return cotangent

    def _judge_last(self, h: Tensor, batch: Batch, metrics: Metrics, *, used: bool) -> Tensor | None:
        outputs = h.detach().requires_grad_(used)
        with torch.enable_grad():
            loss = self._objective(outputs, batch.y)
        plain = loss if self._objective is self._loss else self._loss(outputs.detach(), batch.y)
        metrics["loss"] = plain.detach()
        return torch.autograd.grad(loss, outputs)[0].contiguous() if used else None

    def _credit(self, place: int, key: Key, cotangent: Tensor) -> None:
        """Give a block the derivative of a loss at its output; what the block below is to have of it goes there."""
        stage, (loss, step) = self.stages[place], key
        below = stage.hand_down(step, loss, cotangent)
        if below is not None and place == 0:
            self._links.down(below, self._step)
        stage.learn(step, loss, cotangent)
        if below is not None and place > 0:
            if self._recipe.staleness:
                self._inbox[stage.number - 1][key] = below
            else:
                self._credit(place - 1, key, below)

    def _due(self, number: int, step: int) -> list[Key]:
        """What the block above hands down, in this order, for a block to take in this step."""
        if number == len(self._parts) - 1:
            return []
        losses = range(number + 1, len(self._parts))
        keys = [(loss, step - self._recipe.staleness * (loss - number)) for loss in losses]
        return [(loss, then) for loss, then in keys if then >= 0 and loss in self._routes_at(then).down[number + 1]]

    def _routes_at(self, step: int) -> Routes:
        """Those of the mini-batch of this step, whose derivatives may come when the coupling has grown since."""
        assert self._routes is not None
        reach = self._reach_at(step)
        return self._routes if reach == self._reach else routes(self._credits(reach), self._learning)

    def _from_above(self, stage: Stage, key: Key) -> Tensor:
        if key in self._inbox[stage.number]:
            return self._inbox[stage.number].pop(key)
        return self._links.from_above(stage.flights[key[1]].out)

    def _settle(self) -> None:
        """Take what the rank above has sent for later steps, and wait until what was sent from here is taken."""
        top = self.stages[-1]
        if self._routes is not None and top.number < len(self._parts) - 1:
            for step in range(self._step, self._step + self._recipe.staleness):
                for key in self._due(top.number, step):
                    if key[1] < self._step and key not in self._inbox[top.number]:
                        self._inbox[top.number][key] = self._links.from_above(top.flights[key[1]].out)
        self._links.finish()

    # -- what the first rows decide, and the steps after them ---------------------------------------------------------

    def _meet(self, x: Tensor) -> None:
        """Look at the rows of a step: what a block gives for one of them decides its head, and messages' lengths."""
        if self._known == (x.shape[1:], x.dtype):
            return
        if self._known is None:
            told = {"shape": str(tuple(x.shape)), "dtype": str(x.dtype)}
            require_alike("local", {"rows": told}, self.group)
        rows = one_row(self._parts, x)
        self._known = (x.shape[1:], x.dtype)
        self._place(x[:1].clone(), rows)

    def _place(self, x: Tensor, rows: Sequence[Tensor]) -> None:
        """Make the sites, and the heads of this rank where there are none yet."""
        first = self._sites is None
        last, outputs = len(rows) - 1, rows[-1]
        matrix = next((one for one in reversed(list(self._parts[-1].modules())) if isinstance(one, nn.Linear)), None)
        self._sites = [
            Site(
                number=number,
                h=row.detach().clone(),
                x=x,
                num_outputs=outputs.shape[-1],
                sequence=outputs.dim() == 3,
                depth=number / (last - 1) if last > 1 else 0.0,
                unembedding=None if matrix is None else matrix.weight.detach(),
            )
            for number, row in enumerate(rows)
        ]
        if first:
            for stage in self.stages:
                if stage.number in self._with_heads():
                    stage.head = self._head(stage.number)

    def _with_heads(self) -> list[int]:
        """The blocks whose loss is used at some step of the run, or that are to have a head all the same."""
        reaches = {self._reach_at(0), *range(self._reach_at(0), len(self._parts) + 1 if self._recipe.anneal else 0)}
        used = [routes(self._credits(reach), self._learning).used for reach in reaches]
        return [
            number
            for number in range(len(self._parts) - 1)
            if self._recipe.every_head or any(one[number] for one in used)
        ]

    def _head(self, number: int) -> Head:
        assert self._sites is not None
        module = head(self._recipe, self._sites[number])
        return Head(module, number, self._factories[number], self._recipe.seed, self._device)

    def _heads_of_all(self) -> dict[int, nn.Module]:
        """The heads of all ranks, on every rank. Collective."""
        own = {stage.number: stage.head.module for stage in self.stages if stage.head is not None}
        found = {number: own[number] if number in own else self._head(number).module for number in self._with_heads()}
        heads = [found.get(number, nn.Identity()) for number in range(len(self._parts))]
        self._share(heads)
        return found

    def _share(self, modules: Sequence[nn.Module]) -> None:
        for rank in range(self.group.size if self.group.size > 1 else 0):
            parts = [part for part, owner in zip(modules, self._owners, strict=True) if owner == rank]
            share_from(rank, chain(*(chain(part.parameters(), part.buffers()) for part in parts)), self.group)

    def _reach_at(self, step: int) -> int:
        recipe, num_blocks = self._recipe, len(self._parts)
        first = first_reach(recipe.coupling, recipe.reach)
        return first if recipe.anneal is None else grown(first, num_blocks, recipe.anneal, step)

    def _credits(self, reach: int) -> Credit:
        recipe = self._recipe
        if self._matrix is not None:
            return self._matrix
        coupling = recipe.coupling
        if reach != first_reach(coupling, recipe.reach) and coupling != "chunk":
            coupling = "interlock"  # annealing has begun
        return credit(coupling, len(self._parts), reach, use_own_loss=recipe.use_own_loss)

    def _couple(self, step: int | None = None) -> None:
        """Give the blocks of this rank their rows of the credit matrix at this step."""
        reach = self._reach_at(self._step if step is None else step)
        if self._routes is not None and reach == self._reach:
            return
        self._reach, self._routes = reach, routes(self._credits(reach), self._learning)
        for stage in self.stages:
            stage.row, stage.down = self._routes.rows[stage.number], self._routes.down[stage.number]
            stage.late = self._recipe.staleness > 0 and any(j > stage.number for j in (*stage.row, *stage.down))

    def _set_rate(self) -> float | None:
        if self._recipe.optimizer is not None:
            return None
        found = (one.optimizer for stage in self.stages for one in (stage.block, stage.head) if one is not None)
        return set_rate(self._recipe, self._step, *(one for one in found if one is not None))


def _share_out(parts: Sequence[nn.Module], size: int) -> list[int]:
    if size > len(parts):
        raise CannotTrain(
            f"local puts blocks on ranks, and this model has {len(parts)} for {size} ranks; use at most {len(parts)} "
            "ranks, or cut the model finer (blocks= or at=)"
        )
    return owners([1.0 + sum(one.numel() for one in part.parameters()) for part in parts], size)


def _head_state(head: Head) -> dict[str, Any]:
    entries = [] if head.optimizer is None else entries_of(head.optimizer, head.parameters)
    weights = {name: value.detach().clone() for name, value in head.module.state_dict().items()}
    return {"weights": weights, "optimizer": entries}


def _put_head_state(head: Head, state: Mapping[str, Any]) -> None:
    with torch.no_grad():
        for name, value in head.module.state_dict().items():
            value.copy_(state["weights"][name])
    if head.optimizer is not None:
        put_entries(head.optimizer, head.parameters, list(state["optimizer"]))
