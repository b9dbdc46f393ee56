"""A data set, split and described: what `fit` and the command line train on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..training import BadInput, Batch, Task


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows to train on, rows to choose by, rows to report, and how to scale them.

    The features stay raw, in files and in memory: the first layer of the network is `piecework.nn.Standardise(mean,
    scale)`, so scaling happens batch by batch and is kept with the model. Class targets are (n,) int64 from 0;
    regression targets are (n, k) and already standardised, so a prediction z means z * target_scale + target_mean.
    Raises BadInput where the parts do not fit together."""

    name: str
    train: Batch
    validation: Batch | None
    """A part of the training rows, for early stopping and for choosing settings; None unless it was asked for."""
    test: Batch | None
    task: Task
    mean: Tensor
    """(d,) mean of each feature over the training rows (the validation rows are not among them)."""
    scale: Tensor
    """(d,) their standard deviation, 1 for a constant feature; for pictures the value of white, the same everywhere."""
    classes: tuple[str, ...] = ()
    """The label of class 0, 1, ...; empty for a regression."""
    target_mean: Tensor | None = None
    """(k,) float64, in the units of the data; None for classes."""
    target_scale: Tensor | None = None
    """(k,) float64, in the units of the data; None for classes."""
    note: str = ""
    """What was inferred, in one line."""
    feature_names: tuple[str, ...] = ()
    """The names of the columns, where they have names."""
    target_name: str | None = None
    """The column that was the target: its name, or its number from 0 in a file without a header; else None."""

    def __post_init__(self) -> None:
        if self.mean.dim() != 1 or self.mean.shape != self.scale.shape:
            raise BadInput(
                f"mean and scale must be vectors of one length, got {tuple(self.mean.shape)}, {tuple(self.scale.shape)}"
            )
        if self.feature_names and len(self.feature_names) != self.num_features:
            raise BadInput(f"{len(self.feature_names)} feature names were given for {self.num_features} features")
        if self.task == "multiclass" and len(self.classes) < 2:
            raise BadInput(f"a multiclass data set names its classes, at least two; got {self.classes}")
        if self.task == "binary" and len(self.classes) not in (0, 2):
            raise BadInput(f"a binary data set has two classes, got {self.classes}")

    @property
    def sequences(self) -> bool:
        """Whether a row is a sequence of tokens (n, T), with a class for each of them."""
        return self.task == "multiclass" and self.train.y.dim() == 2

    @property
    def num_features(self) -> int:
        """d: what the network takes, a picture counted pixel by pixel."""
        return self.mean.numel()

    @property
    def num_outputs(self) -> int:
        """What the network gives: 1 for two classes, the number of classes for more, k for a regression."""
        if self.task == "regression":
            return int(self.train.y.shape[1])
        return 1 if self.task == "binary" else len(self.classes)
