"""Many ranks for a test: `threads` in memory, for nearly everything, and `processes` with real sockets, for a few."""

from __future__ import annotations

import builtins
import io
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from typing import Any, Literal, TypeVar, overload

import torch
import torch.distributed as dist

from .. import training
from ..group import Group, Ranks, launched
from ..training import PeerLost
from .faults import Killed, thread_rank
from .in_memory import Board, Threads

R = TypeVar("R")

_GRACE = 5.0
"""Seconds a rank may still take to end after the last wait must have ended."""


@overload
def threads(n: int, fn: Callable[[Group], R], *, timeout: float = ..., wait: float | None = ...) -> list[R]: ...


@overload
def threads(
    n: int, fn: Callable[[Group], R], *, timeout: float = ..., wait: float | None = ..., outcomes: Literal[True]
) -> list[R | BaseException]: ...


def threads(
    n: int, fn: Callable[[Group], Any], *, timeout: float = 60.0, wait: float | None = None, outcomes: bool = False
) -> list[Any]:
    """Call fn(group) on n ranks that are threads of this process; returns the results in rank order.

    timeout: seconds in all, after which every wait has ended. wait: seconds a verb may wait (default: as long).
    outcomes: return a list of results *or exceptions*, one a rank, and raise nothing.

    The group works as `Ranks` does, counts the same bytes and rounds, adds up in rank order, and refuses what would be
    garbage on real ranks (`ValueError`). When a rank ends, by an exception or not, whoever waits for it gets `PeerLost`
    at once. Raises the first error that is not the consequence of another rank's, with a note that names the rank;
    `TimeoutError` for a rank that does not end."""
    end = time.monotonic() + timeout
    board = Board(n, wait=timeout if wait is None else wait, end=end)
    found: dict[int, Any] = {}
    failures: dict[int, BaseException] = {}

    all_looked = threading.Barrier(n)

    def work(rank: int) -> None:
        why = f"rank {rank} has finished"
        try:
            torch.get_num_threads()  # a thread takes over torch's number at its first look: before any rank changes it
            all_looked.wait()
            with thread_rank():
                found[rank] = fn(Threads(rank, board))
        except BaseException as error:  # whatever ends a rank is its outcome
            failures[rank], why = error, f"rank {rank} ended by {type(error).__name__}: {error}"
        board.end(rank, why)

    ranks = [threading.Thread(target=work, args=(rank,), name=f"rank-{rank}", daemon=True) for rank in range(n)]
    for thread in ranks:
        thread.start()
    for rank, thread in enumerate(ranks):
        thread.join(max(0.0, end + _GRACE - time.monotonic()))
        if thread.is_alive():
            failures.setdefault(rank, TimeoutError(f"rank {rank} was still running after {timeout:g} s"))
    return _results(n, found, failures, outcomes)


@overload
def processes(
    n: int, fn: Callable[[Group], R], *, timeout: float = ..., wait: float | None = ..., backend: str = ...
) -> list[R]: ...


@overload
def processes(
    n: int,
    fn: Callable[[Group], R],
    *,
    timeout: float = ...,
    wait: float | None = ...,
    backend: str = ...,
    outcomes: Literal[True],
) -> list[R | BaseException]: ...


def processes(
    n: int,
    fn: Callable[[Group], Any],
    *,
    timeout: float = 120.0,
    wait: float | None = None,
    backend: str = "gloo",
    outcomes: bool = False,
) -> list[Any]:
    """Call fn(group) on n ranks that are processes of their own, on 127.0.0.1; returns the results in rank order.

    fn: importable (a function of a module, or a `functools.partial` of one). It returns what
        `torch.load(weights_only=True)` reads: tensors, numbers, strings, lists, dicts.
    timeout: seconds in all, after which what still runs is killed. wait: seconds a verb may wait (default: as long).
    backend: torch's name of it. outcomes: return a list of results *or exceptions*, one a rank, and raise nothing; a
        process that was killed is a `Killed`.

    The processes are started one by one, with one thread each and the environment of torchrun (RANK, WORLD_SIZE,
    MASTER_ADDR, MASTER_PORT); the store is held by this process, so that it outlives every rank. Raises the first error
    that is not the consequence of another rank's, with that rank's traceback as a note; `TimeoutError` for a rank that
    does not end."""
    _check_importable(fn)
    end = time.monotonic() + timeout
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout)
    )
    run = partial(_child, fn, n, store.port, backend, timeout, wait)
    children: list[BaseProcess] = []
    pipes: list[connection.Connection] = []
    try:
        with _one_thread():
            _start(n, run, children, pipes)
        found, failures = _listen(children, pipes, end, timeout)
    finally:
        _end(children, pipes)
        del store
    return _results(n, found, failures, outcomes)


def _start(n: int, run: Callable[..., None], children: list[BaseProcess], pipes: list[connection.Connection]) -> None:
    """Start the ranks, noting each at once, so that they can be ended if the next one does not start."""
    context = get_context("spawn")
    for rank in range(n):
        ours, theirs = context.Pipe(duplex=False)
        pipes.append(ours)
        child = context.Process(target=run, args=(rank, theirs), daemon=True)
        child.start()
        children.append(child)
        theirs.close()  # now the rank has the only writing end, and its death is an end of file here


def _end(children: Sequence[BaseProcess], pipes: Sequence[connection.Connection]) -> None:
    until = time.monotonic() + _GRACE
    for child in children:
        child.join(max(0.0, until - time.monotonic()))
        child.kill()
        child.join()
        child.close()
    for pipe in pipes:
        pipe.close()


def _listen(
    children: Sequence[BaseProcess], pipes: Sequence[connection.Connection], end: float, timeout: float
) -> tuple[dict[int, Any], dict[int, BaseException]]:
    """Each rank's message, or what its silence means, in the order in which they end."""
    found: dict[int, Any] = {}
    failures: dict[int, BaseException] = {}
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    while waiting:
        ready = connection.wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            for rank in waiting.values():
                children[rank].kill()
                failures[rank] = TimeoutError(f"rank {rank} was still running after {timeout:g} s")
            break
        for pipe in ready:
            assert isinstance(pipe, connection.Connection)
            rank = waiting.pop(pipe)
            try:
                what, value = _unpack(pipe.recv_bytes())
            except EOFError:
                failures[rank] = _died(rank, children[rank])
                continue
            if what == "result":
                found[rank] = value
            else:
                failures[rank] = _rebuilt(rank, value)
    return found, failures


def _died(rank: int, child: BaseProcess) -> BaseException:
    child.join(_GRACE)
    code = child.exitcode
    if code is not None and code < 0:
        return Killed(f"rank {rank} was killed by {signal.Signals(-code).name}")
    return RuntimeError(f"rank {rank} ended without a result (exit status {code})")


def _results(n: int, found: dict[int, Any], failures: dict[int, BaseException], outcomes: bool) -> list[Any]:
    """The results, or the error that came first; a lost peer is the consequence of another error, if there is one."""
    if outcomes:
        return [failures[rank] if rank in failures else found[rank] for rank in range(n)]
    causes = [rank for rank, error in failures.items() if not isinstance(error, PeerLost | Killed | TimeoutError)]
    losses = [rank for rank, error in failures.items() if isinstance(error, PeerLost)]
    for rank in (*causes, *losses, *failures):
        error = failures[rank]
        error.add_note(f"on rank {rank} of {n}")
        if isinstance(error, Killed):
            raise RuntimeError(f"{error}, and no other rank noticed") from error
        raise error
    return [found[rank] for rank in range(n)]


def _child(
    fn: Callable[[Group], Any],
    n: int,
    port: int,
    backend: str,
    timeout: float,
    wait: float | None,
    rank: int,
    pipe: connection.Connection,
) -> None:
    seat = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1"}
    # With the last one, rank 0 does not try to hold the store as well.
    os.environ.update(seat, MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)
    try:
        with launched(timeout=timeout, backend=backend) as group:
            if wait is not None and isinstance(group, Ranks):
                group.timeout = wait  # only now: the ranks may need longer than that to start
            message = _pack("result", fn(group))
    except BaseException as error:  # whatever ends a rank is its outcome
        message = _pack("error", json.dumps(_described(error)))
    pipe.send_bytes(message)
    pipe.close()


def _pack(what: str, value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save([what, value], buffer)
    try:
        _unpack(buffer.getvalue())
    except Exception as error:
        kinds = "tensors, numbers, strings, lists, dicts"
        raise TypeError(f"the function must return {kinds}; got {type(value).__name__}: {error}") from error
    return buffer.getvalue()


def _unpack(message: bytes) -> tuple[str, Any]:
    what, value = torch.load(io.BytesIO(message), weights_only=True)
    return what, value


def _described(error: BaseException) -> dict[str, Any]:
    lost = {"rank", "peer", "verb", "timeout", "step"} if isinstance(error, PeerLost) else set()
    return {
        "type": type(error).__name__,
        "text": str(error),
        "lost": {name: getattr(error, name) for name in lost},
        "trace": "".join(traceback.format_exception(error)),
    }


def _rebuilt(rank: int, message: str) -> BaseException:
    """The error of another process: one of ours or of Python's by its name, anything else as a `RuntimeError`."""
    told = json.loads(message)
    kind = getattr(training, told["type"], None) or getattr(builtins, told["type"], None)
    if kind is PeerLost:
        error: BaseException = PeerLost(**told["lost"])
        error.args = (told["text"],)
    elif (
        isinstance(kind, type)
        and issubclass(kind, Exception)
        and not issubclass(kind, UnicodeError | BaseExceptionGroup)
    ):
        error = kind(told["text"])
    else:
        error = RuntimeError(f"{told['type']}: {told['text']}")
    error.add_note(f"rank {rank} ended by:\n{told['trace']}")
    return error


def _check_importable(fn: Callable[..., Any]) -> None:
    inner = fn
    while isinstance(inner, partial):
        inner = inner.func
    name = getattr(inner, "__qualname__", "")
    if "<" in name:
        raise TypeError(f"processes() needs a function that a new process can import; {name} is local to another one")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes started meanwhile use one thread; libraries read this while they load, so it must be there before."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
