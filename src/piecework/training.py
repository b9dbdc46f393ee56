"""The one contract of the library: a Method is a recipe, a Training is that recipe at work on one model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .group import Group
    from .losses import Loss

Metrics = dict[str, Tensor]
"""What a step reports: detached 0-d tensors by name. `loss` is the user's mean loss on the batch, where it is known."""

Task = Literal["binary", "multiclass", "regression"]


@dataclass(frozen=True)
class Batch:
    """Some rows of a data set.

    x: (n, ...) features; it may be backed by a memory-mapped file, and then it is read in tiles and never copied.
    y: (n,) int64 classes counted from 0, or (n, k) floating-point targets.
    index: (n,) int64 numbers of these rows in the data set, for methods that keep something per sample.
    """

    x: Tensor
    y: Tensor
    index: Tensor | None = None

    def __len__(self) -> int:
        return self.x.shape[0]


B = TypeVar("B", contravariant=True)


@runtime_checkable
class Training(Protocol[B]):
    """A method at work on one model. Structural: there is nothing to inherit."""

    model: nn.Module
    """A plain module; after `sync()` it is the deployed network."""
    data: Literal["shard", "same"]
    """Own rows on each rank, or the same rows on every rank."""
    batches: Literal["mini", "full"]
    """Mini-batches, or one Batch of all rows of this rank."""
    deterministic: bool
    """Same seed, rank and thread count give the same bits."""

    def step(self, batch: B) -> Metrics:
        """Move once: a mini-batch, or a sweep over a full batch. Collective over the ranks."""
        ...

    def sync(self) -> None:
        """Fill `model` with the deployed network, equal on every rank, without altering the trajectory.

        Collective and idempotent."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs to go on and `model` does not hold: tensors and plain values only. Collective."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` gave on the same rank of as many ranks."""
        ...


class Method(Protocol):
    """A recipe: a frozen dataclass of settings that binds to a model, a loss and a group of ranks."""

    def bind(self, model: nn.Module, loss: Loss, *, group: Group | None = None) -> Training[Batch]:
        """Start a Training; the start weights are those of rank 0. Refuses what it cannot train with `CannotTrain`."""
        ...


class CannotTrain(ValueError):
    """This method cannot train this model with this loss; the message names the part and the way out."""


class BadInput(ValueError):
    """Data, settings or a run folder that cannot be used; the message says what was given and what is accepted."""


class PeerLost(RuntimeError):
    """A rank did not answer in time.

    rank: who noticed; peer: who is missing, where that is known; verb: what was being done; step: in which step,
    where known; timeout: seconds waited at most."""

    def __init__(
        self, *, rank: int, peer: int | None, verb: str, timeout: float, step: int | None = None, cause: str = ""
    ) -> None:
        self.rank, self.peer, self.verb, self.step, self.timeout = rank, peer, verb, step, timeout
        who = "a peer" if peer is None else f"rank {peer}"
        when = "" if step is None else f" at step {step}"
        why = f" ({cause})" if cause else ""
        super().__init__(
            f"rank {rank} lost {who} in {verb}{when}: no answer within {timeout:g} s{why}; "
            "look for the first error of that rank, then resume the run from its folder"
        )


class DidNotSolve(RuntimeError):
    """A solver failed where nothing can go on; the message is the solver's reason."""


def stream(seed: int, *key: int) -> torch.Generator:
    """A CPU generator of its own for (seed, key...), for example (seed, rank, block, step)."""
    digest = hashlib.blake2b(",".join(map(str, (seed, *key))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
