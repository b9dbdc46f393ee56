"""Block-ADMM at work on one model: the blocks of this rank, step by step."""

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
from ..blocks import Block, owners
from ..optimizer_state import entries_of, put_entries
from ..parameters import share_from, start_from_rank_0
from ..schedule import set_rate
from .bench import Bench
from .cuts import cut
from .neighbours import Neighbours
from .pipeline import Pipeline
from .stall import Stall
from .sweep import Penalties
from .sweeps import Sweeps

if TYPE_CHECKING:
    from . import BlockADMM


class BlocksAtWork:
    """The blocks of this rank at work, in the order of the recipe, and how they are saved."""

    data: Literal["shard", "same"] = "same"
    batches: Literal["mini", "full"] = "mini"
    deterministic = True

    def __init__(self, recipe: BlockADMM, model: nn.Module, loss: Loss, group: Group) -> None:
        self.model, self.group = model, group
        self._recipe, self._loss = recipe, loss
        parts = cut(model, at=recipe.at, blocks=recipe.blocks)
        self._owners = _share_out(parts, group.size)
        mine = [number for number, rank in enumerate(self._owners) if rank == group.rank]
        self._device = device_of(model)
        start_from_rank_0(model, group)
        factories = recipe.factories(len(parts))
        self._parts = parts
        self._blocks = [Block(parts[one], one, factories[one], recipe.seed, self._device) for one in mine]
        self._neighbours = Neighbours(group, parts, mine[0], mine[-1])
        learning = [number for number, part in enumerate(parts) if any(one.requires_grad for one in part.parameters())]
        betas = recipe.betas(len(parts))
        self._penalties = Penalties(
            beta=[torch.tensor(beta, dtype=torch.float64) for beta in betas] if recipe.balance else [*betas],
            alpha_beta=recipe.alpha_beta,
            local_steps=recipe.local_steps,
            dual_step=recipe.dual_step,
            # In a pipe the weights move between a block's forward pass and its visit: graphs would be stale.
            keep_graphs=not recipe.recompute and recipe.order != "pipelined",
            linear=recipe.prox == "linear",
            objective=smoothed(loss, recipe.label_smoothing),
            num_blocks=len(parts),
            lowest=learning[0],
        )
        bench = Bench(recipe, self._blocks, self._penalties, self._neighbours, loss, group)
        self._order = Pipeline(bench) if recipe.order == "pipelined" else Sweeps(bench)
        self._stall = Stall(recipe.stall_sweeps, group)
        self._step = 0

    def step(self, batch: Batch) -> Metrics:
        if len(batch) == 0:
            raise BadInput("a mini-batch has no rows; give every rank the same number, at least one")
        if not self.model.training:
            self.model.train()
        lr = self._set_rate()
        batch = Batch(batch.x.to(self._device), batch.y.to(self._device), batch.index)
        self._neighbours.learn(batch.x)
        metrics = self._order.advance(batch, self._step)
        self._neighbours.finish()
        self._stall.look(metrics.get("loss"), self._recipe.sweeps)
        self._step += 1
        return metrics if lr is None else {**metrics, "lr": torch.tensor(lr, dtype=torch.float64)}

    def sync(self) -> None:
        """Each rank gets the blocks of the others."""
        for rank in range(self.group.size if self.group.size > 1 else 0):
            parts = [part for part, owner in zip(self._parts, self._owners, strict=True) if owner == rank]
            share_from(rank, chain(*(chain(part.parameters(), part.buffers()) for part in parts)), self.group)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self._step,
            "optimizers": {
                str(block.number): entries_of(block.optimizer, block.parameters)
                for block in self._blocks
                if block.optimizer is not None
            },
            "beta": [float(beta) for beta in self._penalties.beta],
            "order": self._order.state_dict(),
            "stall": self._stall.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if len(state["beta"]) != len(self._parts):
            raise BadInput(
                f"the state is of {len(state['beta'])} blocks, and this model is cut into {len(self._parts)}"
            )
        for block in self._blocks:
            if block.optimizer is not None:
                put_entries(block.optimizer, block.parameters, list(state["optimizers"][str(block.number)]))
        for number, beta in enumerate(state["beta"]):
            before = self._penalties.beta[number]
            self._penalties.beta[number] = torch.full_like(before, beta) if isinstance(before, Tensor) else beta
        self._order.load_state_dict(state["order"])
        self._stall.load_state_dict(state["stall"])
        self._step = int(state["step"])

    def _set_rate(self) -> float | None:
        if self._recipe.optimizer is not None:
            return None
        optimizers = (block.optimizer for block in self._blocks if block.optimizer is not None)
        return set_rate(self._recipe, self._step, *optimizers)


def _share_out(parts: Sequence[nn.Module], size: int) -> list[int]:
    if size > len(parts):
        raise CannotTrain(
            f"block-admm puts blocks on ranks, and this model has {len(parts)} for {size} ranks; use at most "
            f"{len(parts)} ranks, or cut the model finer (blocks= or at=)"
        )
    return owners([1.0 + sum(one.numel() for one in part.parameters()) for part in parts], size)
