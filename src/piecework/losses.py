"""Losses and what each can do: value, closed-form gradient and curvature at the outputs, proximal map.

A *total* is a sum over samples, the papers' convention; calling the loss gives the mean, which every report shows.
z: (n, k) outputs; y: (n,) int64 classes from 0, or (n, k) real targets. Of sequences, z (n, T, k) and y (n, T), the
softmax loss takes the mean over the T tokens as the loss of a sample; it has no closed forms for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .solvers import prox
from .training import BadInput, CannotTrain, Task


class Loss(Protocol):
    """A loss on network outputs with its capabilities; a method refuses a loss that lacks one it needs."""

    @property
    def name(self) -> str: ...

    @property
    def curvature_bound(self) -> float | None:
        """A bound c of the second derivative at the outputs of one sample, in the total; None where there is none."""
        ...

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        """The mean loss a sample, 0-d; differentiable by autograd."""
        ...

    def total(self, z: Tensor, y: Tensor) -> Tensor:
        """The sum over samples, 0-d float64."""
        ...

    def decide(self, z: Tensor) -> Tensor:
        """The predicted classes (n,) int64. Real targets need no decision: there the outputs are the prediction."""
        ...

    def targets(self, y: Tensor, num_outputs: int, dtype: torch.dtype) -> Tensor:
        """(n, k) numbers that the outputs aim at: one-hot or 0/1 classes (smoothed where the loss is), or the real
        targets."""
        ...

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        """(n, k): d total / d z in closed form; a subgradient at a kink."""
        ...

    def hessian_mv(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """(n, k): the second derivative at the outputs times v (n, k); 0 for the hinge."""
        ...

    def prox(self, m: Tensor, y: Tensor, beta: float, dual: Tensor | None = None) -> Tensor:
        """argmin over z of l(z, y) + <z, dual> + beta ||z - m||^2 (no 1/2), (n, k)."""
        ...

    def check(self, task: Task, num_outputs: int) -> None:
        """Raises CannotTrain, in a sentence, where the loss does not fit the task or the number of outputs."""
        ...

    def plain(self) -> Loss:
        """The loss that is reported: without label smoothing."""
        ...


class CurvedLoss(Loss, Protocol):
    """A loss whose curvature at the outputs of a sample has a root B, (k, k): B B^T is the Hessian of the total.

    With the residual s, for which B s is the gradient, the total is to second order in a move u of the outputs
    1/2 ||s + B^T u||^2 and a constant: a least-squares problem, which is what Gauss-Newton needs."""

    def residual(self, z: Tensor, y: Tensor) -> Tensor:
        """s, (n, k)."""
        ...

    def root_mv(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """B v, (n, k)."""
        ...

    def root_t_mv(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """B^T v, (n, k)."""
        ...


def encode(y: Tensor, num_outputs: int, dtype: torch.dtype) -> Tensor:
    """(n, k) one-hot classes, (n, 1) 0/1 for one output, or real targets unchanged."""
    if y.is_floating_point():
        return y.to(dtype)
    if num_outputs == 1:
        return y[:, None].to(dtype)
    return F.one_hot(y, num_outputs).to(dtype)


def _mean(per_sample: Tensor) -> Tensor:
    return per_sample.sum() / max(1, len(per_sample))


def _class_of(z: Tensor, threshold: float) -> Tensor:
    """(n,) int64: over the threshold for one output, else the largest."""
    return (z[:, 0] > threshold).long() if z.shape[1] == 1 else z.argmax(1)


@dataclass(frozen=True)
class Squared:
    """||z - y||^2, summed over outputs, without 1/2; classes are 0/1 or one-hot targets, with threshold 1/2. For any
    task."""

    name = "squared"
    curvature_bound = 2.0

    def _each(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - encode(y, z.shape[1], z.dtype)).square().sum(1)

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        return _mean(self._each(z, y))

    def total(self, z: Tensor, y: Tensor) -> Tensor:
        return self._each(z, y).double().sum()

    def decide(self, z: Tensor) -> Tensor:
        return _class_of(z, 0.5)

    def targets(self, y: Tensor, num_outputs: int, dtype: torch.dtype) -> Tensor:
        return encode(y, num_outputs, dtype)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - encode(y, z.shape[1], z.dtype)).mul_(2)

    def hessian_mv(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return 2 * v

    def residual(self, z: Tensor, y: Tensor) -> Tensor:
        """sqrt(2) (z - y): the total has no 1/2."""
        return (z - encode(y, z.shape[1], z.dtype)).mul_(_ROOT_TWO)

    def root_mv(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return _ROOT_TWO * v

    def root_t_mv(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return _ROOT_TWO * v

    def prox(self, m: Tensor, y: Tensor, beta: float, dual: Tensor | None = None) -> Tensor:
        return prox.squared(m, encode(y, m.shape[1], m.dtype), beta, dual)

    def check(self, task: Task, num_outputs: int) -> None:
        _need_outputs(self.name, task, num_outputs)

    def plain(self) -> Squared:
        return self


@dataclass(frozen=True)
class Hinge:
    """The hinge of Taylor et al. 2016: max(1 - z, 0) for y = 1 and max(z, 0) for y = 0, summed over the outputs
    (one output for two classes, one-versus-rest otherwise); the threshold is 1/2."""

    name = "hinge"
    curvature_bound = None

    def _each(self, z: Tensor, y: Tensor) -> Tensor:
        target = encode(y, z.shape[1], z.dtype)
        return torch.where(target > 0.5, 1 - z, z).clamp_min(0).sum(1)

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        return _mean(self._each(z, y))

    def total(self, z: Tensor, y: Tensor) -> Tensor:
        return self._each(z, y).double().sum()

    def decide(self, z: Tensor) -> Tensor:
        return _class_of(z, 0.5)

    def targets(self, y: Tensor, num_outputs: int, dtype: torch.dtype) -> Tensor:
        return encode(y, num_outputs, dtype)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        on = encode(y, z.shape[1], z.dtype) > 0.5
        return torch.where(on, -(z < 1).to(z.dtype), (z > 0).to(z.dtype))

    def hessian_mv(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """0: the hinge is piecewise linear. A method that divides by curvature needs another source of it."""
        return torch.zeros_like(v)

    def prox(self, m: Tensor, y: Tensor, beta: float, dual: Tensor | None = None) -> Tensor:
        return prox.hinge(m, encode(y, m.shape[1], m.dtype), beta, dual)

    def check(self, task: Task, num_outputs: int) -> None:
        _need_classes(self.name, task)
        _need_outputs(self.name, task, num_outputs)

    def plain(self) -> Hinge:
        return self


@dataclass(frozen=True)
class Logistic:
    """Logistic loss of one output for two classes: log(1 + exp(z)) - y z."""

    label_smoothing: float = 0.0
    """In [0, 1): targets become y (1 - smoothing) + smoothing / 2."""

    name = "logistic"
    curvature_bound = 0.25

    def __post_init__(self) -> None:
        _need_part(self.name, self.label_smoothing)

    def targets(self, y: Tensor, num_outputs: int, dtype: torch.dtype) -> Tensor:
        return encode(y, num_outputs, dtype) * (1 - self.label_smoothing) + self.label_smoothing / 2

    def _each(self, z: Tensor, y: Tensor) -> Tensor:
        # softplus(z) - y z cancels where a row is right and sure of it, as torch's own two forms do: it would cost 0.
        targets = self.targets(y, z.shape[1], z.dtype)
        return -(targets * F.logsigmoid(z) + (1 - targets) * F.logsigmoid(-z)).sum(1)

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        return _mean(self._each(z, y))

    def total(self, z: Tensor, y: Tensor) -> Tensor:
        return self._each(z, y).double().sum()

    def decide(self, z: Tensor) -> Tensor:
        return _class_of(z, 0.0)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.sigmoid(z) - self.targets(y, z.shape[1], z.dtype)

    def hessian_mv(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        p = torch.sigmoid(z)
        return p * (1 - p) * v

    def residual(self, z: Tensor, y: Tensor) -> Tensor:
        return self.gradient(z, y) / self._root(z)

    def root_mv(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self._root(z) * v

    def root_t_mv(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self._root(z) * v

    @staticmethod
    def _root(z: Tensor) -> Tensor:
        """sqrt(p (1 - p)), bounded below: far out the curvature vanishes before the gradient does."""
        return (torch.sigmoid(z) * torch.sigmoid(-z)).clamp_min(_least(z)).sqrt()

    def prox(self, m: Tensor, y: Tensor, beta: float, dual: Tensor | None = None) -> Tensor:
        return prox.logistic(m, self.targets(y, m.shape[1], m.dtype), beta, dual)

    def check(self, task: Task, num_outputs: int) -> None:
        _need_classes(self.name, task)
        if task != "binary" or num_outputs != 1:
            raise CannotTrain(
                f"the logistic loss is for two classes and one output, this is {task} with {num_outputs}; use softmax"
            )

    def plain(self) -> Logistic:
        return replace(self, label_smoothing=0.0)


@dataclass(frozen=True)
class Softmax:
    """Softmax cross-entropy of k >= 2 outputs, of rows or of the tokens of sequences."""

    label_smoothing: float = 0.0
    """In [0, 1): targets become y (1 - smoothing) + smoothing / k, as in torch."""

    name = "softmax"
    curvature_bound = 0.5

    def __post_init__(self) -> None:
        _need_part(self.name, self.label_smoothing)

    def targets(self, y: Tensor, num_outputs: int, dtype: torch.dtype) -> Tensor:
        if y.dim() > 1 and not y.is_floating_point():
            raise CannotTrain(
                "the softmax loss has no closed forms for sequences of classes, which this method asks for; train with "
                "local, adam, sgd, lbfgs or cg"
            )
        return encode(y, num_outputs, dtype) * (1 - self.label_smoothing) + self.label_smoothing / num_outputs

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        if z.dim() > 2:
            z, y = z.flatten(0, -2), y.flatten()
        return F.cross_entropy(z, y, label_smoothing=self.label_smoothing, reduction="sum") / max(1, len(z))

    def total(self, z: Tensor, y: Tensor) -> Tensor:
        tokens = y[:1].numel() or 1
        if z.dim() > 2:
            z, y = z.flatten(0, -2), y.flatten()
        each = F.cross_entropy(z, y, label_smoothing=self.label_smoothing, reduction="none")
        return each.double().sum() if tokens == 1 else each.double().sum() / tokens

    def decide(self, z: Tensor) -> Tensor:
        return z.argmax(-1)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.softmax(z, 1) - self.targets(y, z.shape[1], z.dtype)

    def hessian_mv(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        p = torch.softmax(z, 1)
        return p * (v - (p * v).sum(1, keepdim=True))

    def residual(self, z: Tensor, y: Tensor) -> Tensor:
        # The projection I - q q^T of the root leaves it as it is, because q^T s = sum(p - y) = 0.
        return self.gradient(z, y) / self._root(z)

    def root_mv(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        q = self._root(z)
        return q * (v - q * (q * v).sum(1, keepdim=True))

    def root_t_mv(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        q = self._root(z)
        return q * v - q * (q * q * v).sum(1, keepdim=True)

    @staticmethod
    def _root(z: Tensor) -> Tensor:
        """q = sqrt(p), bounded below; B = diag(q) (I - q q^T)."""
        return torch.softmax(z, 1).clamp_min(_least(z)).sqrt()

    def prox(self, m: Tensor, y: Tensor, beta: float, dual: Tensor | None = None) -> Tensor:
        return prox.softmax(m, self.targets(y, m.shape[1], m.dtype), beta, dual)

    def check(self, task: Task, num_outputs: int) -> None:
        _need_classes(self.name, task)
        if num_outputs < 2:
            raise CannotTrain(f"softmax needs two outputs or more, the network has {num_outputs}; use logistic")

    def plain(self) -> Softmax:
        return replace(self, label_smoothing=0.0)


_ROOT_TWO = math.sqrt(2.0)


def _least(z: Tensor) -> float:
    """The least probability of which a root divides: its square root is 1e-6 in float32, 1e-14 in float64."""
    return 1e-28 if z.dtype == torch.float64 else 1e-12


def _need_classes(name: str, task: Task) -> None:
    if task == "regression":
        raise CannotTrain(f"the {name} loss is for classes and the targets are real numbers; use squared")


def _need_outputs(name: str, task: Task, num_outputs: int) -> None:
    if task == "multiclass" and num_outputs < 2:
        raise CannotTrain(
            f"the {name} loss of more than two classes needs an output for each class, the network has {num_outputs}"
        )


def _need_part(name: str, smoothing: float) -> None:
    if not 0 <= smoothing < 1:
        raise BadInput(f"the {name} loss: label_smoothing must be in [0, 1), got {smoothing}")


NAMES: dict[str, type[Squared | Hinge | Logistic | Softmax]] = {
    "squared": Squared,
    "hinge": Hinge,
    "logistic": Logistic,
    "softmax": Softmax,
}
_AUTO: dict[Task, str] = {"binary": "logistic", "multiclass": "softmax", "regression": "squared"}


def named(name: str, **settings: float) -> Loss:
    """The loss of that name with those settings. Raises BadInput for an unknown name, setting or value."""
    if name not in NAMES:
        raise BadInput(f"no loss {name!r}; there are {', '.join(NAMES)}")
    known = [field.name for field in fields(NAMES[name])]
    for setting in settings:
        if setting not in known:
            raise BadInput(f"the {name} loss has no setting {setting!r}; it has {', '.join(known) or 'none'}")
    return NAMES[name](**settings)


def auto(task: Task) -> Loss:
    """The usual loss of a task: logistic, softmax or squared."""
    return named(_AUTO[task])


def smoothed(loss: Loss, smoothing: float) -> Loss:
    """The loss with smoothed labels. Raises CannotTrain for a loss without `label_smoothing`."""
    if smoothing == 0:
        return loss
    given: Any = loss
    names: list[str] = [field.name for field in fields(given)] if is_dataclass(loss) else []
    if "label_smoothing" not in names:
        raise CannotTrain(
            f"the {loss.name} loss has no smoothed labels; set label_smoothing=0, or use the softmax or logistic loss"
        )
    found: Loss = replace(given, label_smoothing=smoothing)
    return found
