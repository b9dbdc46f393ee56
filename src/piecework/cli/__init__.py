"""The command line: `piecework fit | compare | resume | predict | show | simulate | methods | data`."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

COMMANDS = {
    "fit": "train on a data set, show progress, leave a run folder",
    "compare": "train several methods on the same data: one table, one figure",
    "resume": "go on with a run as if it had never stopped",
    "predict": "apply a trained run to new rows",
    "show": "table and figure of finished runs",
    "simulate": "how long a step on many ranks would take, by a virtual clock",
    "methods": "list the methods and what each is",
    "data": "list the data sets and where they are",
}
"""What each command does, in a line."""

PATIENCE = 3.0
"""Seconds that a rank which has refused waits for the one that says why: torchrun ends all when the first one ends."""

USAGE = """usage: piecework COMMAND ...

Train neural networks in pieces, and compare that with backpropagation.

commands
{commands}

first steps
  piecework fit digits admm              train without a gradient
  piecework compare digits --methods admm adam lbfgs
  piecework show runs/digits-admm-1

piecework COMMAND --help says more; piecework fit METHOD --help lists the settings of a method;
torchrun --nproc-per-node 4 -m piecework fit ... runs the same thing on four ranks.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and give its exit status: 0, 2 for a user's mistake, 3 for a lost peer or a failed solve, 130 after
    Ctrl-C. argv: the words behind `piecework`, by default those of this process."""
    words = list(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.showwarning = _each_warning_once()
        try:
            status = _run(words)
            sys.stdout.flush()
            return status
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            # Whoever read the output has gone; the interpreter must not complain when it flushes at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except Exception as error:
            failed = _status(error)
            if failed is None:
                raise
            if failed == 3 or _speaks():
                _say("error", str(error))
            else:
                time.sleep(PATIENCE)
            return failed


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print(USAGE.format(commands="\n".join(f"  {name:{width}}  {does}" for name, does in COMMANDS.items())), end="")
        return 0 if words else 2
    if words[0] == "--version":
        from importlib import metadata

        print(f"piecework {metadata.version('piecework')}")
        return 0
    if words[0] not in COMMANDS:
        from ..training import BadInput
        from .parse import near

        raise BadInput(f"there is no command {words[0]}{near(words[0], COMMANDS)}; there are {', '.join(COMMANDS)}")
    try:
        return _command(words[0])(words[1:])
    except SystemExit as end:  # after a help
        return end.code if isinstance(end.code, int) else 0


def _command(name: str) -> Callable[[Sequence[str]], int]:
    """The function of a command; nothing is imported for the others."""
    if name in ("fit", "resume"):
        from .train import fit_command, resume_command

        return fit_command if name == "fit" else resume_command
    if name == "compare":
        from .compare import compare_command

        return compare_command
    if name == "predict":
        from .predict import predict_command

        return predict_command
    if name == "show":
        from .show import show_command

        return show_command
    if name == "simulate":
        from .simulate import simulate_command

        return simulate_command
    from .listings import data_command, methods_command

    return methods_command if name == "methods" else data_command


def _status(error: Exception) -> int | None:
    """The exit status of an error that has a sentence for its user; None for one that is a defect."""
    from ..training import BadInput, CannotTrain, DidNotSolve, PeerLost

    if isinstance(error, BadInput | CannotTrain):
        return 2
    return 3 if isinstance(error, PeerLost | DidNotSolve) else None


def _say(kind: str, text: str) -> None:
    print(f"piecework: {kind}: " + " ".join(text.split()), file=sys.stderr, flush=True)


def _each_warning_once() -> Callable[..., None]:
    """What Python is to call for a warning: a sentence without the place in the source, said once."""
    said: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if _speaks() and str(message) not in said:
            said.add(str(message))
            _say("warning", str(message))

    return show


def _speaks() -> bool:
    """Whether this rank says what all ranks of this machine have to say."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
