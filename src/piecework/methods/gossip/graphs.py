"""Who sends to whom in which round: functions of (rank, round, size) that give {peer: share}, in whole numbers.

A share is what part of its mass a rank gives away; it keeps the rest, so every column of the mixing matrix sums to one
by construction. Rows need not. Over some rounds a graph must let each rank pass something on to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from ...training import BadInput

GraphName = Literal["exponential", "ring", "complete", "mixed-radix"]

Graph = Callable[[int, int, int], Mapping[int, float]]
"""What rank gives away in round 0, 1, ... of size ranks; alike on all ranks. Shares are above 0, together below 1."""


def exponential(rank: int, round: int, size: int) -> Mapping[int, float]:
    """One peer a round, 2^k ranks further on, k = round mod ceil(log2 size): half of the mass.

    Exact averages after ceil(log2 size) rounds where size is a power of two; elsewhere nearly."""
    return {} if size == 1 else {(rank + (1 << round % (size - 1).bit_length())) % size: 0.5}


def ring(rank: int, round: int, size: int) -> Mapping[int, float]:
    """The next rank, each round: half of the mass. The slowest to mix."""
    return {} if size == 1 else {(rank + 1) % size: 0.5}


def complete(rank: int, round: int, size: int) -> Mapping[int, float]:
    """Every other rank, each round: exact averages, by size - 1 messages a rank."""
    return {peer: 1 / size for peer in range(size) if peer != rank}


def mixed_radix(rank: int, round: int, size: int) -> Mapping[int, float]:
    """With size = f_1 f_2 ... f_m in primes: in round r the f - 1 peers whose number differs in digit r mod m alone.

    Exact averages after m rounds for any size. A prime size makes it the complete graph."""
    factors = prime_factors(size)
    if not factors:
        return {}
    place, unit = round % len(factors), 1
    for factor in factors[:place]:
        unit *= factor
    radix = factors[place]
    digit = rank // unit % radix
    return {rank + (other - digit) * unit: 1 / radix for other in range(radix) if other != digit}


NAMED: dict[str, Graph] = {
    "exponential": exponential,
    "ring": ring,
    "complete": complete,
    "mixed-radix": mixed_radix,
}


def prime_factors(number: int) -> list[int]:
    """In rising order, with repetitions; none for 1."""
    found, factor = [], 2
    while factor * factor <= number:
        while number % factor == 0:
            found.append(factor)
            number //= factor
        factor += 1
    return [*found, number] if number > 1 else found


class Links:
    """A graph as one rank of so many sees it, checked round by round. Raises BadInput for shares that are none."""

    def __init__(self, graph: str | Graph, rank: int, size: int) -> None:
        self._graph = NAMED[graph] if isinstance(graph, str) else graph
        self.rank, self._size = rank, size
        self._known: dict[int, list[int]] = {}

    def out(self, round: int) -> Mapping[int, float]:
        """{peer: share} of what this rank sends in a round."""
        return self._checked(self.rank, round)

    def sources(self, round: int) -> list[int]:
        """Who sends to this rank in a round, in rising order."""
        if round not in self._known:
            if len(self._known) > 64:
                self._known.clear()
            others = [other for other in range(self._size) if other != self.rank]
            self._known[round] = [other for other in others if self.rank in self._checked(other, round)]
        return self._known[round]

    def _checked(self, rank: int, round: int) -> Mapping[int, float]:
        shares = self._graph(rank, round, self._size)
        good = all(peer != rank and 0 <= peer < self._size and share > 0 for peer, share in shares.items())
        if not good or not sum(shares.values()) < 1:
            raise BadInput(
                f"gossip: the graph gives rank {rank} of {self._size} the shares {dict(shares)} in round {round}; they "
                "go to other ranks, are above 0, and leave something for the rank itself"
            )
        return shares


def joins(graph: str | Graph, size: int, rounds: int = 64) -> bool:
    """Whether each rank can pass something on to each other, over so many rounds."""
    forth: list[set[int]] = [set() for _ in range(size)]
    back: list[set[int]] = [set() for _ in range(size)]
    for rank in range(size):
        links = Links(graph, rank, size)
        for round in range(rounds):
            for peer in links.out(round):
                forth[rank].add(peer)
                back[peer].add(rank)
    return len(_reached(forth)) == size == len(_reached(back))


def _reached(edges: list[set[int]]) -> set[int]:
    seen, todo = {0}, [0]
    while todo:
        new = edges[todo.pop()] - seen
        seen |= new
        todo += new
    return seen
