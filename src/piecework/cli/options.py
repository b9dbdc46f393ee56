"""What can be asked for on the command line: a frozen dataclass a command, read by tyro."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import arg

Activation = Literal["relu", "leaky-relu", "hard-sigmoid", "tanh", "sigmoid", "sign", "identity"]

_ALL = arg(metavar="N", help_behavior_hint="(default: all)")
_NONE = {"help_behavior_hint": "(default: none)"}


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which rows, and what they mean."""

    target: Annotated[str | None, arg(metavar="COLUMN", **_NONE)] = None
    """The target column of a csv or parquet file: its name, or its number from 0 (-1 is the last)."""

    task: Annotated[
        Literal["auto", "binary", "multiclass", "regression"], arg(metavar="auto|binary|multiclass|regression")
    ] = "auto"
    """What the target means; auto infers it from the target and says so."""

    rows: Annotated[int | None, _ALL] = None
    """Use so many of the training rows, chosen by seed."""

    test_rows: Annotated[int | None, _ALL] = None
    """Report on so many of the test rows, chosen by seed."""

    validation: Annotated[float | None, arg(metavar="PART", help_behavior_hint="(default: 0)")] = None
    """Set this part of the training rows aside, by seed, to stop by or to choose by; 0.1 is a tenth."""


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The network, and the loss that it is to lower."""

    hidden: Annotated[tuple[int, ...], arg(metavar="WIDTH ...")] = (100,)
    """Widths of the hidden layers; none at all makes a linear model."""

    activation: Annotated[Activation, arg(metavar="NAME")] = "relu"
    """relu, leaky-relu, hard-sigmoid, tanh, sigmoid, sign or identity."""

    factors: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: none, or the method's own)")] = None
    """Rank of an NMF layer between the last hidden layer and the output, which then sees non-negative factors alone."""

    model: Annotated[str | None, arg(metavar="MODULE:FUNCTION", **_NONE)] = None
    """A network of your own in place of --hidden: function(num_features, num_outputs) -> nn.Module, importable."""

    loss: Annotated[
        Literal["auto", "squared", "hinge", "softmax", "logistic"], arg(metavar="auto|squared|hinge|softmax|logistic")
    ] = "auto"
    """auto takes the method's own choice for the task, or else logistic, softmax or squared."""

    dtype: Annotated[Literal["float32", "float64"], arg(metavar="float32|float64")] = "float32"
    """Number type of the network and its training."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How long, and how often to look. Without a limit: 40 steps of a full-batch method, 10 epochs of mini-batches."""

    steps: Annotated[int | None, arg(metavar="N", **_NONE)] = None
    """Stop after so many steps: mini-batches, or sweeps (outer iterations) of a full-batch method."""

    epochs: Annotated[int | None, arg(metavar="N", **_NONE)] = None
    """Stop after so many passes of mini-batches over the training rows; a full-batch step counts as one."""

    seconds: Annotated[float | None, arg(metavar="S", **_NONE)] = None
    """Stop after so many seconds of training; evaluation is not counted."""

    stop_at: Annotated[float | None, arg(metavar="SCORE", **_NONE)] = None
    """Stop when the validation score reaches this."""

    patience: Annotated[int | None, arg(metavar="N", **_NONE)] = None
    """Stop after N evaluations without a better validation score, and keep the best network."""

    evaluate_every: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: an epoch)")] = None
    """Steps between two rows of the history."""

    batch_size: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 128)")] = None
    """Rows of a mini-batch on each rank; refused by full-batch methods."""

    seed: Annotated[int, arg(metavar="N")] = 0
    """Decides the start weights, the split, the order of the rows, and what a method draws."""

    threads: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: torch's)")] = None
    """Threads of this process; results are bit-equal for equal numbers."""

    device: Annotated[str, arg(metavar="DEVICE")] = "cpu"
    """cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where the results go."""

    out: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="(default: a new one in runs/)")] = None
    """The folder to make; one that exists is refused."""

    overwrite: bool = False
    """Take the folder even if it holds an earlier run, which is lost."""

    json: bool = False
    """Print the summary as JSON, and nothing else, on standard output."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What `fit` can be told."""

    data: DataOptions = field(default_factory=DataOptions)
    network: NetworkOptions = field(default_factory=NetworkOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    output: OutputOptions = field(default_factory=OutputOptions)


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """What is compared."""

    methods: Annotated[tuple[str, ...], arg(metavar="METHOD ...", help_behavior_hint="(default: admm adam lbfgs)")] = ()
    """The methods, with settings after a colon: admm adam:lr=3e-3,weight-decay=1e-4."""

    seeds: Annotated[int, arg(metavar="N")] = 1
    """Run each method with so many seeds, from --seed on; the table shows medians and ranges."""

    tune: Annotated[tuple[str, ...], arg(metavar="SETTING=VALUE,... ...", help_behavior_hint="(default: none)")] = ()
    """Try these values and keep those with the best validation score; methods without the setting ignore it."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What `compare` can be told."""

    comparison: ComparisonOptions = field(default_factory=ComparisonOptions)
    data: DataOptions = field(default_factory=DataOptions)
    network: NetworkOptions = field(default_factory=NetworkOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    output: OutputOptions = field(default_factory=OutputOptions)


@dataclass(frozen=True, kw_only=True)
class ResumeOptions:
    """What `resume` can be told."""

    steps: Annotated[int | None, arg(metavar="N", **_NONE)] = None
    """Go on to so many steps in all. Without --steps and --seconds the run's own limits hold."""

    seconds: Annotated[float | None, arg(metavar="S", **_NONE)] = None
    """Go on to so many training seconds in all."""

    factors: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: none, or the method's own)")] = None
    """Rank of an NMF layer between the last hidden layer and the output, which then sees non-negative factors alone."""

    model: Annotated[str | None, arg(metavar="MODULE:FUNCTION", **_NONE)] = None
    """The network's function again, for a run that was started with --model: what a folder names is never imported."""

    json: bool = False
    """Print the summary as JSON, and nothing else, on standard output."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """What `predict` can be told."""

    out: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="(default: standard output)")] = None
    """The csv file to write; one that exists is refused."""

    overwrite: bool = False
    """Replace a file that exists."""

    factors: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: none, or the method's own)")] = None
    """Rank of an NMF layer between the last hidden layer and the output, which then sees non-negative factors alone."""

    model: Annotated[str | None, arg(metavar="MODULE:FUNCTION", **_NONE)] = None
    """The network's function again, for a run that was started with --model: what a folder names is never imported."""


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """What `show` can be told."""

    out: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="(default: show.png in the first run)")] = None
    """The picture to write (PNG)."""

    timeline: bool = False
    """Draw who waited for whom, when, in place of the scores: for runs on several ranks."""

    between: Annotated[tuple[float, float] | None, arg(metavar="S S", **_NONE)] = None
    """With --timeline, the training seconds to draw; otherwise six steps in the middle."""


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """What `simulate` can be told."""

    model_mb: Annotated[float, arg(metavar="MB")] = 100.0
    """Megabytes (10^6 bytes) of all parameters."""

    step_ms: Annotated[float, arg(metavar="MS")] = 250.0
    """Milliseconds that one rank computes in a step, without messages."""

    ranks: Annotated[tuple[int, ...], arg(metavar="N ...")] = (4, 8, 16, 32)
    """Numbers of ranks."""

    mbit: Annotated[tuple[float, ...], arg(metavar="RATE ...")] = (1000.0, 10_000.0)
    """Rates of each rank's link, in both directions at once: 10^6 bits a second."""

    latency_ms: Annotated[float, arg(metavar="MS")] = 0.1
    """Milliseconds that a message takes besides its bytes."""

    stalls: Annotated[float, arg(metavar="P")] = 0.0
    """Probability that a rank's step takes one step's time longer."""

    slow: Annotated[float, arg(metavar="FACTOR")] = 1.0
    """One rank's steps take so many times as long, for good."""

    spread: Annotated[float, arg(metavar="SIGMA")] = 0.0
    """Standard deviation of the logarithm of each step's time."""

    bucket_mb: Annotated[
        float | None, arg(metavar="MB", help_behavior_hint="(default: a quarter of the model, at most 25)")
    ] = None
    """Megabytes of the buckets in which gradients are averaged."""

    steps: Annotated[int, arg(metavar="N")] = 48
    """Steps to take."""

    seed: Annotated[int, arg(metavar="SEED")] = 0
    """Decides stalls and spread."""

    out: Annotated[str, arg(metavar="FILE")] = "simulate.png"
    """The picture to write (PNG)."""

    json: bool = False
    """Print the cells as JSON, and nothing else, on standard output; no picture."""


@dataclass(frozen=True, kw_only=True)
class DataListOptions:
    """What `data` can be told: nothing."""


@dataclass(frozen=True, kw_only=True)
class MethodListOptions:
    """What `methods` can be told: nothing."""
