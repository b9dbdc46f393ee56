"""Anonymous memory of ADMM on a memory-mapped file larger than it: `python benchmarks/memory.py`.

A seeded generator writes 10.5 million rows of 28 features to an uncompressed .npz file; the command line then trains on
it in a process of its own, whose RssAnon is sampled from /proc every 50 ms (Linux).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

import report


def write(path: Path, rows: int, seed: int = 0) -> None:
    """x (rows, 28) float32 and y (rows,) uint8, stored without compression, written a million rows at a time."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        parts = {}
        for name, dtype, shape in (("x", np.float32, (rows, 28)), ("y", np.uint8, (rows,))):
            part = Path(folder) / f"{name}.npy"
            parts[name] = (part, np.lib.format.open_memmap(part, mode="w+", dtype=dtype, shape=shape))
        generator = np.random.default_rng(seed)
        for start in range(0, rows, 1_000_000):
            stop = min(start + 1_000_000, rows)
            x = generator.standard_normal((stop - start, 28), dtype=np.float32)
            score = x[:, 0] * x[:, 1] + np.abs(x[:, 2]) - np.abs(x[:, 3]) + 0.5 * x[:, 4]
            parts["x"][1][start:stop] = x
            parts["y"][1][start:stop] = score + generator.standard_normal(stop - start) > 0
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, (part, array) in parts.items():
                array.flush()
                archive.write(part, f"{name}.npy")


def anonymous(pid: int) -> int:
    """RssAnon of a process in KiB; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def watched(command: list[str]) -> tuple[int, float, str]:
    """Peak RssAnon in KiB, seconds, and standard output of a command."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.05)
    out = process.stdout.read() if process.stdout else ""
    if process.returncode:
        sys.exit(f"{command} ended with {process.returncode}")
    return peak, time.perf_counter() - began, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_500_000)
    parser.add_argument("--sweeps", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the file goes (1.2 GB); a temporary folder by default")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for count in (arguments.rows // 10, arguments.rows):
            path = Path(folder) / f"rows{count}.npz"
            write(path, count)
            command = [sys.executable, "-m", "piecework", "fit", str(path), "--hidden", "300", "--steps"]
            command += [str(arguments.sweeps), "--evaluate-every", str(arguments.sweeps), "--threads", "2", "--json"]
            command += ["--out", str(Path(folder) / f"run{count}"), "admm"]
            peak, wall, out = watched(command)
            summary = json.loads(out)
            rows.append([
                count, path.stat().st_size / 1e6, peak / 1024, wall, summary["seconds"] / arguments.sweeps,
                summary["test"]["score"],
            ])  # fmt: skip
            path.unlink()
    header = ["rows", "file, MB", "peak RssAnon, MiB", "seconds in all", "seconds a sweep", "test accuracy"]
    note = f"28-300-1, {arguments.sweeps} sweeps, float32, seed 0; loading, checks and evaluation are in the peak."
    report.write("memory", "Training on a memory-mapped file", [(note, header, rows)])


if __name__ == "__main__":
    main()
