"""AD-PSGD: Lian, Zhang, Zhang, Liu, "Asynchronous decentralized parallel stochastic gradient descent", 2018,
arXiv:1710.06952, algorithm 1. A baseline of gossip, under the contract of `gossip_baselines.py`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gossip_baselines import Factory, Training
from one_vector import Vector, average_, gradient_of
from piecework import Batch, Group
from piecework.group import Ranks, current
from piecework.losses import Loss
from piecework.methods.parameters import start_from_rank_0, trainable
from piecework.training import Metrics, stream


@dataclass(frozen=True, kw_only=True)
class ADPSGD:
    """Even ranks average with a random odd rank, one step after another in a thread of their own; nobody waits.

    Both sides move by half of the difference of what they sent, so that steps taken meanwhile are kept and the sum over
    the ranks is too. The gradient is that of the parameters at the beginning of the step."""

    optimizer: Factory
    bound: int | None = 1
    """Steps that an even rank may be ahead of its averages, at most one of which belongs to a step; None for any."""
    seed: int = 0

    def bind(self, model: nn.Module, loss: Loss, *, group: Group | None = None) -> Training:
        return _ADPSGD(self, model, loss, group or current())


class _ADPSGD:
    def __init__(self, recipe: ADPSGD, model: nn.Module, loss: Loss, group: Group) -> None:
        if not isinstance(group, Ranks) or group.size < 2:
            raise ValueError("AD-PSGD needs at least two processes of a torch process group")
        self.model, self._loss, self._group, self._recipe = model, loss, group, recipe
        start_from_rank_0(model, group)
        parameters = trainable(model, "ad-psgd")
        self._own = Vector(parameters)
        self._optimizer = recipe.optimizer(parameters)
        self._x = self._own.x.clone()  # what the threads average; the model keeps still during a gradient
        self._changed = threading.Condition()
        self._steps = self._averages = 0
        self._stopping, self._failed = False, None
        self._threads = [threading.Thread(target=self._guarded, args=args, daemon=True) for args in self._jobs()]
        # Collectives keep the group; a receive that waits for hours has one of its own.
        self._pg = dist.new_group(dist.get_process_group_ranks(group.process_group), timeout=timedelta(hours=12))
        for thread in self._threads:
            thread.start()

    def step(self, batch: Batch) -> Metrics:
        self._wait_for_averages()
        with self._changed:
            self._own.x.copy_(self._x)
        loss = gradient_of(self.model, self._loss, self._optimizer, batch)
        with self._changed:
            self._own.x.copy_(self._x)
            self._optimizer.step()
            self._x.copy_(self._own.x)
            self._steps += 1
            self._changed.notify_all()
        return {"loss": loss}

    def sync(self) -> None:
        """The mean of the moment: averages go on meanwhile, until `close`."""
        with self._changed:
            self._own.x.copy_(self._x)
        average_(self._own.x, self._group)

    def close(self) -> None:
        """Even ranks finish their last average and say goodbye to every odd one, which ends those ranks' threads."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._is_active:
            for thread in self._threads:
                thread.join()
            for peer in self._peers():
                self._send(torch.zeros(1), peer)  # shorter than what is expected: gloo leaves the rest untouched
        for thread in self._threads:
            thread.join()

    @property
    def _is_active(self) -> bool:
        return self._group.rank % 2 == 0

    def _peers(self) -> list[int]:
        return list(range(1 if self._is_active else 0, self._group.size, 2))

    def _jobs(self) -> list[tuple[object, ...]]:
        return [(self._propose,)] if self._is_active else [(self._answer, peer) for peer in self._peers()]

    def _guarded(self, job: Callable[..., None], *args: int) -> None:
        try:
            job(*args)
        except RuntimeError as error:
            with self._changed:
                self._failed = error
                self._changed.notify_all()

    def _wait_for_averages(self) -> None:
        bound = self._recipe.bound
        if bound is not None and self._is_active:
            with self._changed:
                self._changed.wait_for(lambda: self._failed or self._steps - self._averages <= bound)
        if self._failed is not None:
            raise self._failed

    def _propose(self) -> None:
        draw, peers = stream(self._recipe.seed, self._group.rank), self._peers()
        message, reply = torch.ones(self._x.numel() + 1), torch.empty_like(self._x)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._averages < self._steps)
                if self._stopping:
                    return
                message[1:].copy_(self._x)
            peer = peers[int(torch.randint(len(peers), (), generator=draw))]
            self._send(message, peer)
            self._receive(reply, peer)
            with self._changed:
                self._x.add_(reply.sub_(message[1:]), alpha=0.5)
                self._averages += 1
                self._changed.notify_all()

    def _answer(self, peer: int) -> None:
        message, reply = torch.empty(self._x.numel() + 1), torch.empty_like(self._x)
        while True:
            self._receive(message, peer)
            if message[0] == 0:
                return
            with self._changed:
                reply.copy_(self._x)
                self._x.lerp_(message[1:], 0.5)
            self._send(reply, peer)

    def _send(self, tensor: Tensor, peer: int) -> None:
        self._pg.send([tensor], peer, 0).wait()
        self._group.bytes_sent += tensor.numel() * tensor.element_size()
        self._group.rounds += 1

    def _receive(self, tensor: Tensor, peer: int) -> None:
        self._pg.recv([tensor], peer, 0).wait()
