"""Tables of benchmarks: a Markdown file a claim, with command, commit, machine and seeds above the rows."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


def write(name: str, title: str, sections: Sequence[tuple[str, Sequence[str], Sequence[Sequence[object]]]]) -> Path:
    """Write results/<name>.md: sections of (text, header, rows), and print it."""
    threads = torch.get_num_threads()
    dirty = " (with uncommitted changes)" if _output("git", "status", "--porcelain", "--", "../src") else ""
    lines = [
        f"# {title}",
        "",
        f"- command: `{shlex.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *sys.argv[1:]])}`",
        f"- commit: {_output('git', 'rev-parse', '--short', 'HEAD')}{dirty}, {datetime.date.today()}",
        f"- machine: {processor()}, {os.cpu_count()} cores, {platform.system()}; torch {torch.__version__}, "
        f"{threads} {'thread' if threads == 1 else 'threads'}, load {os.getloadavg()[2]:.1f} at the end",
    ]
    for text, header, rows in sections:
        lines += ["", text] if text else []
        if header:
            lines += ["", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
            lines += ["| " + " | ".join(show(cell) for cell in row) + " |" for row in rows]
    text = "\n".join(lines) + "\n"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    path.write_text(text)
    print(text, flush=True)
    return path


def show(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.4g}" if abs(cell) < 1e4 else f"{cell:.3e}"
    return str(cell)


def median(values: Sequence[float | None]) -> float | None:
    """The median, or None where more than half of the values are missing (a target that was not reached)."""
    known = [np.inf if value is None else value for value in values]
    middle = float(np.median(known)) if known else np.inf
    return middle if np.isfinite(middle) else None


def spread(values: Sequence[float | None], digits: int = 4) -> str:
    """Median and range, as text."""
    middle = median(values)
    known = [value for value in values if value is not None]
    if middle is None:
        return f"not reached ({len(known)} of {len(values)} seeds)"
    if len(values) == 1:
        return f"{middle:.{digits}f}"
    some = "" if len(known) == len(values) else f" ({len(known)} of {len(values)} seeds)"
    return f"{middle:.{digits}f} [{min(known):.{digits}f}, {max(known):.{digits}f}]{some}"
