"""Ranks in network namespaces of their own, joined by shaped links: real processes, real sockets, chosen bandwidth.

    with Links(8, rate_mbit=100) as links:
        results = links.run(fn, timeout=120)

A bridge in this process's namespace joins one veth pair a rank. What a rank sends is shaped at its end of the pair,
what it receives at the bridge's end, each by a token bucket (`tc qdisc ... tbf`), so that every rank has a full-duplex
link of that rate to a switch without limits. `fn(group)` runs on every rank under the environment of torchrun; the
store is held by this process, so it outlives any rank. `python benchmarks/calibration.py` checks what the links do.

Needs Linux, root, and iproute2; `Links.available()` says what is missing. Names carry this process's id: what a killed
run leaves behind is removed by the next one.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from piecework import Group
from piecework.group import Ranks, launched
from piecework.testing import ranks as testing

INTERFACE = "link0"
"""The name of a rank's end of its link, inside its namespace."""

QUEUE_S = 0.05
"""Seconds of traffic that may wait at the end of a link before packets are dropped."""

BURST_S, LEAST_BURST = 0.0003, 17 * 1024
"""Seconds of traffic that may pass at once after a pause, and its least number of bytes."""

GSO_BYTES = 16 * 1024
"""Most bytes of TCP that the namespaces hand on as one packet. Less than a burst: a token bucket cuts larger ones into
frames, and each frame then costs as much of the processor as the whole packet did."""

_CLONE_NEWNET, _PR_SET_PDEATHSIG = 0x40000000, 1


class NoLinks(RuntimeError):
    """The system does not give shaped links; the message says why."""


class Links:
    """n namespaces on one bridge; a context manager, one at a time in a process.

    rate_mbit: the rate of each link in each direction, 10^6 bits a second on the wire; None for no shaping.
    congestion: TCP's congestion control in the namespaces; None for the system's own. Every kernel allows "reno" there,
        so that the links are the same on all machines."""

    _open = False

    def __init__(self, n: int, *, rate_mbit: float | None = None, congestion: str | None = "reno") -> None:
        if not 1 <= n <= 200:
            raise ValueError(f"between 1 and 200 ranks, got {n}")
        self.n, self.rate_mbit, self._congestion = n, rate_mbit, congestion
        self._prefix = f"pw{os.getpid()}"
        self._before: Any = None

    @staticmethod
    def available() -> str | None:
        """None, or one sentence that says why there can be no shaped links here."""
        if not sys.platform.startswith("linux"):
            return f"network namespaces are Linux's, and this is {sys.platform}"
        if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
            return f"iproute2 is missing: no {' and no '.join(missing)}"
        if os.geteuid() != 0:
            return "network namespaces need root, and this is another user"
        _remove_stale()
        try:
            with Links(1, rate_mbit=100):
                return None
        except NoLinks as error:
            return str(error)

    def __enter__(self) -> Links:
        if Links._open:
            raise RuntimeError("this process has links already; close them first")
        Links._open = True
        self._catch_sigterm()
        try:
            _remove_stale()
            self._subnet = _free_subnet()
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _remove(self._prefix)
        Links._open = False
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    @property
    def address(self) -> str:
        """This process's address on the bridge."""
        return f"{self._subnet}.254"

    def namespace(self, rank: int) -> str:
        return f"{self._prefix}-{rank}"

    def run(self, fn: Callable[[Group], Any], *, timeout: float = 120.0, wait: float | None = None) -> list[Any]:
        """fn(group) on every rank; the results in rank order. Arguments and errors as in `testing.processes`."""
        with self.start(fn, timeout=timeout, wait=wait) as run:
            return run.results()

    def start(self, fn: Callable[[Group], Any], *, timeout: float = 120.0, wait: float | None = None) -> Run:
        """As `run`, without waiting: for tests that signal a rank or cut a link meanwhile. A context manager."""
        return Run(self, fn, timeout, wait)

    def shape(self, rank: int, rate_mbit: float | None) -> None:
        """Give the rank's link another rate, also during a run."""
        ends: tuple[tuple[str, ...], ...] = (
            ("-n", self.namespace(rank), "qdisc", "replace", "dev", INTERFACE),
            ("qdisc", "replace", "dev", self._port(rank)),
        )
        for end in ends:
            _call("tc", *end, "root", *(("pfifo_fast",) if rate_mbit is None else _bucket(rate_mbit)))

    def cut(self, rank: int) -> None:
        """Take the rank's link down: nothing passes, and no connection is told."""
        _call("ip", "link", "set", self._port(rank), "down")

    def restore(self, rank: int) -> None:
        _call("ip", "link", "set", self._port(rank), "up")

    def num_bytes(self) -> list[int]:
        """Bytes that each rank has put on its link so far, with all headers."""
        return [int(_read(f"/sys/class/net/{self._port(rank)}/statistics/rx_bytes")) for rank in range(self.n)]

    def _port(self, rank: int) -> str:
        return f"{self._prefix}v{rank}"

    def _build(self) -> None:
        bridge = f"{self._prefix}b"
        _call("ip", "link", "add", bridge, "type", "bridge", "forward_delay", "0")
        _call("ip", "address", "add", f"{self.address}/24", "dev", bridge)
        _call("ip", "link", "set", bridge, "up")
        for rank in range(self.n):
            inside = self.namespace(rank)
            _call("ip", "netns", "add", inside)
            _call("ip", "link", "add", self._port(rank), "type", "veth", "peer", "name", INTERFACE, "netns", inside)
            for end in ((self._port(rank),), (INTERFACE,)):
                there = ("-n", inside) if end[0] == INTERFACE else ()
                _call("ip", *there, "link", "set", *end, "gso_max_size", str(GSO_BYTES))
            _call("ip", "link", "set", self._port(rank), "master", bridge, "up")
            _call("ip", "-n", inside, "address", "add", f"{self._subnet}.{rank + 1}/24", "dev", INTERFACE)
            _call("ip", "-n", inside, "link", "set", INTERFACE, "up")
            _call("ip", "-n", inside, "link", "set", "lo", "up")
            if self._congestion is not None:
                set_it = f"echo {self._congestion} > /proc/sys/net/ipv4/tcp_congestion_control"
                _call("ip", "netns", "exec", inside, "sh", "-c", set_it)
            if self.rate_mbit is not None:
                self.shape(rank, self.rate_mbit)

    def _catch_sigterm(self) -> None:
        """`timeout` and friends end a run by SIGTERM: leave through the context managers then too."""
        usable = threading.current_thread() is threading.main_thread()
        if usable and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            self._before = signal.signal(signal.SIGTERM, _leave)


class Run:
    """Ranks at work on `links`. Leaving the context ends what still runs."""

    def __init__(self, links: Links, fn: Callable[[Group], Any], timeout: float, wait: float | None) -> None:
        testing._check_importable(fn)
        self._timeout, self._end = timeout, time.monotonic() + timeout
        self._children: list[BaseProcess] = []
        self._pipes: list[connection.Connection] = []
        self.store = dist.TCPStore(
            links.address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout)
        )
        """The ranks' store; a rank reaches it by `Ranks.process_group`, and a test can wait for its keys here."""
        child = partial(_child, fn, links._prefix, links.n, links.address, self.store.port, timeout, wait)
        try:
            self._start(child, links.n)
        except BaseException:
            self.__exit__()
            raise

    def _start(self, child: Callable[..., None], n: int) -> None:
        """Ranks are forked by a server that has imported everything: 8 start in a second, and not in 20 on 2 cores."""
        context = get_context("forkserver")
        context.set_forkserver_preload(["__main__", "torch.distributed", "piecework.methods", "sklearn.datasets"])
        with testing._one_thread(), _without_warnings():
            for rank in range(n):
                ours, theirs = context.Pipe(duplex=False)
                self._pipes.append(ours)
                process = context.Process(target=child, args=(rank, theirs), daemon=True)
                process.start()
                self._children.append(process)
                theirs.close()  # now the rank has the only writing end, and its death is an end of file here

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.kill()
        testing._end(self._children, self._pipes)
        self._children, self._pipes = [], []

    def signal(self, rank: int, signum: int) -> None:
        """Send the rank SIGSTOP, SIGCONT, SIGKILL..."""
        pid = self._children[rank].pid
        assert pid is not None
        os.kill(pid, signum)

    def results(self, *, outcomes: bool = False) -> list[Any]:
        """Wait for all ranks; with outcomes, a list of results or exceptions, and nothing is raised."""
        found, failures = testing._listen(self._children, self._pipes, self._end, self._timeout)
        return testing._results(len(self._children), found, failures, outcomes)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Processes started meanwhile are silent about addresses without a name; torch reads this while it loads."""
    before = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCH_CPP_LOG_LEVEL"]


def _child(
    fn: Callable[[Group], Any],
    prefix: str,
    n: int,
    address: str,
    port: int,
    timeout: float,
    wait: float | None,
    rank: int,
    pipe: connection.Connection,
) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a parent that is killed leaves no rank behind
    seat = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "MASTER_ADDR": address}
    seat |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": INTERFACE}
    os.environ.update(seat)
    torch.set_num_threads(1)
    try:
        _enter(libc, f"{prefix}-{rank}")
        with launched(timeout=timeout, backend="gloo") as group:
            if wait is not None and isinstance(group, Ranks):
                group.timeout = wait  # only now: the ranks may need longer than that to start
            message = testing._pack("result", fn(group))
    except BaseException as error:  # whatever ends a rank is its outcome
        message = testing._pack("error", json.dumps(testing._described(error)))
    pipe.send_bytes(message)
    pipe.close()


def _enter(libc: ctypes.CDLL, namespace: str) -> None:
    """Move this thread, and with it those that it starts from now on, into the namespace."""
    with open(f"/run/netns/{namespace}") as place:
        if libc.setns(place.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {namespace}")


def _bucket(rate_mbit: float) -> tuple[str, ...]:
    bytes_per_s = rate_mbit * 1e6 / 8
    burst = max(int(bytes_per_s * BURST_S), LEAST_BURST)
    limit = burst + int(bytes_per_s * QUEUE_S)
    return ("tbf", "rate", f"{round(rate_mbit * 1e6)}bit", "burst", str(burst), "limit", str(limit))


def _call(*command: str) -> None:
    """Raises NoLinks with the command and what it said."""
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except OSError as error:
        raise NoLinks(f"cannot run {command[0]}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout or f"exit status {error.returncode}").strip().splitlines()[-1]
        raise NoLinks(f"the system refuses `{' '.join(command)}`: {said}") from error


def _read(path: str) -> str:
    return Path(path).read_text()


def _free_subnet() -> str:
    """The first three numbers of a private network that no interface here uses."""
    used = subprocess.run(("ip", "-4", "-o", "address"), capture_output=True, text=True, check=True).stdout
    candidates = (f"10.87.{(os.getpid() + shift) % 256}" for shift in range(256))
    return next(subnet for subnet in candidates if f" {subnet}." not in used)


def _remove_stale() -> None:
    """Remove what processes that are no more have left behind."""
    found = {match[1] for name in _names() if (match := re.fullmatch(r"pw(\d+)(-\d+|b|v\d+)", name))}
    for pid in found:
        if not Path(f"/proc/{pid}").exists():
            _remove(f"pw{pid}")


def _remove(prefix: str) -> None:
    """Remove all namespaces and interfaces of a prefix, whatever a half-finished start has made of them."""
    for name in _names():
        if re.fullmatch(rf"{prefix}-\d+", name):
            subprocess.run(("ip", "netns", "delete", name), capture_output=True)
        elif re.fullmatch(rf"{prefix}(b|v\d+)", name):
            subprocess.run(("ip", "link", "delete", name), capture_output=True)


def _names() -> list[str]:
    """Namespaces first: with a namespace goes its veth pair."""
    return [path.name for place in ("/run/netns", "/sys/class/net") for path in Path(place).glob("pw*")]


def _leave(signum: int, _: FrameType | None) -> None:
    raise SystemExit(128 + signum)
