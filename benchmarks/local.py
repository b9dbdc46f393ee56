"""Local blocks against backpropagation and pipelines of it: `python benchmarks/local.py PART [WORDS ...]`.

throughput: rows a second of two local blocks on two processes of one thread, of backpropagation on one process with one
    and with two threads, and of torch's GPipe and 1F1B schedules on the same two processes. WORDS: transformer, mlp,
    resnet; all of them if left out. About 25 minutes in all, of which every one is timed.
language: validation loss of a character transformer after equal seconds, rates tuned alike. WORDS: parts of the names
    of rows. About 9 minutes a row (nine runs of a minute), of which every one is timed.
period: the steady state, measured for two processes and of blocks that sleep, and a recurrence up to 16 stages. About
    8 minutes, of which every one is timed.
memory: the most that autograd keeps at once, a stage, and the bytes that each link carries in a step. Counts: 3
    minutes, and other work on the machine does no harm.
flops: matrix products, heads counted, until a training loss is reached, on one process. Counts: 5 minutes.

Timed parts want the machine for themselves. With --cache FILE and --limit SECONDS a command stops in time with status
75, and goes on where it was when it is started again. With --smoke everything is tiny and nothing is written.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import report
from local_counts import flops, memory
from local_language import language
from local_period import steady
from local_runs import SIZES, Section, throughput
from unfinished import ENDED_EARLY, Runs, Unfinished

Part = Callable[[Runs, dict[str, int], tuple[str, ...]], list[Section]]
PARTS: dict[str, Part] = {
    "throughput": throughput,
    "language": language,
    "period": steady,
    "memory": memory,
    "flops": flops,
}


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("part", choices=PARTS)
    words.add_argument("words", nargs="*", help="what of it; all of it if left out")
    words.add_argument("--cache", type=Path, help="JSON file that keeps what single runs gave")
    words.add_argument("--limit", type=float, default=math.inf, help="seconds after which no further run is begun")
    words.add_argument("--smoke", action="store_true")
    chosen = words.parse_args()
    runs = Runs(chosen.cache, chosen.limit)
    try:
        sections = PARTS[chosen.part](runs, SIZES["smoke" if chosen.smoke else "full"], tuple(chosen.words))
    except Unfinished as left:
        print(f"more to run, from {left} on; start the same command again", file=sys.stderr)
        return ENDED_EARLY
    if chosen.smoke:
        for text, header, rows in sections:
            print(text, header, *rows, sep="\n")
    else:
        report.write(f"local-{chosen.part}", f"Local blocks: {chosen.part}", [*sections])
    return 0


if __name__ == "__main__":
    sys.exit(main())
