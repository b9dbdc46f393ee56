"""`Classifier` and `Regressor`: fully connected networks for scikit-learn, trained by any method of this package."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from . import losses
from .data import Dataset, checks, scaling
from .data.source import Array
from .data.splits import ordering
from .evaluation import TILE, deployed, device_of
from .fit import fit
from .group import Solo
from .history import History
from .losses import Hinge, Logistic, Loss, Softmax, Squared
from .methods import ADMM
from .models import mlp
from .nn import Standardise
from .progress import Progress
from .recipe_settings import is_recipe, replaced, settings
from .training import BadInput, Batch, DidNotSolve, Method, Task

STEPS, EPOCHS = 30, 30
"""The limit where none is given: steps of a full-batch method, epochs of a mini-batch one."""

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_VALIDATION = int.from_bytes(b"held", "big")


class _Estimator(BaseEstimator):  # type: ignore[misc]
    """What they have in common: the parameters, and the way from two arrays to a deployed network."""

    _default: ClassVar[type[Method]] = ADMM
    """The method that None stands for."""

    def __init__(
        self,
        method: Method | None = None,
        *,
        hidden: Sequence[int] = (100,),
        activation: str = "relu",
        loss: str | Loss = "auto",
        steps: int | None = None,
        epochs: int | None = None,
        seconds: float | None = None,
        batch_size: int = 128,
        validation: float = 0.0,
        patience: int | None = None,
        random_state: int | np.random.RandomState | None = 0,
        dtype: str = "float32",
        verbose: bool = False,
    ) -> None:
        self.method = method
        self.hidden = hidden
        self.activation = activation
        self.loss = loss
        self.steps = steps
        self.epochs = epochs
        self.seconds = seconds
        self.batch_size = batch_size
        self.validation = validation
        self.patience = patience
        self.random_state = random_state
        self.dtype = dtype
        self.verbose = verbose

    # -- parameters --------------------------------------------------------------------------------------------------

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters by name; with `deep` also the settings of the method and of the loss, as `method__ridge`."""
        given: dict[str, Any] = super().get_params(deep=deep)
        if deep:
            for name in tuple(given):
                recipe = self._recipe(name, given[name])
                if recipe is not None:
                    given |= {f"{name}__{key}": value for key, value in settings(recipe).items()}
        return given

    def set_params(self, **params: Any) -> Self:
        """Set parameters by name; `method__ridge=0.1` puts a method with that setting in the place of the present one.

        Nothing is set if one name or setting is refused. Raises BadInput for a name that there is not."""
        names = self._get_param_names()
        plain = {key: value for key, value in params.items() if "__" not in key}
        inner: dict[str, dict[str, Any]] = {}
        for key, value in params.items():
            name, tied, rest = key.partition("__")
            if name not in names:
                raise BadInput(
                    f"{type(self).__name__} has no parameter '{name}'{checks.suggestion(name, names)}; "
                    f"it has {', '.join(names)}"
                )
            if tied:
                inner.setdefault(name, {})[rest] = value
        for name, changes in inner.items():
            recipe = self._recipe(name, plain.get(name, getattr(self, name)))
            if recipe is None:
                raise BadInput(f"{name} has no settings of its own, so {name}__{next(iter(changes))} cannot be set")
            plain[name] = replaced(recipe, changes)
        super().set_params(**plain)
        return self

    @classmethod
    def _recipe(cls, name: str, value: Any) -> Any | None:
        """The dataclass that a parameter stands for, if it does."""
        if name == "method" and value is None:
            return cls._default()
        return value if is_recipe(value) else None

    # -- fitting -----------------------------------------------------------------------------------------------------

    def _train(self, x: Array, y: Array, task: Task, classes: Sequence[str], loss: Loss) -> Dataset:
        """Train on rows x (n, d) with classes y (n,) counted from 0, or numbers y (n, k), and keep what came of it."""
        seed, dtype, method = _seed(self.random_state), self._dtype(), self._method()
        data = self._dataset(x, y, task, classes, dtype, seed)
        loss.check(task, data.num_outputs)
        widths = [data.num_features, *self._hidden(), data.num_outputs]
        network = self._network(widths, seed, dtype)
        model = nn.Sequential(OrderedDict(scaling=Standardise(data.mean, data.scale), network=network))
        group = Solo()  # not the running torch process group: only some of its processes may be here
        training = method.bind(model, loss, group=group)
        limits = self._limits(training.batches)
        said = f"{type(method).__name__} {'-'.join(map(str, widths))}"
        with Progress(quiet=not self.verbose) as progress:
            on_row = progress.run(said, **{name: limits[name] for name in ("steps", "epochs", "seconds")})
            more = {**limits, "batch_size": self.batch_size, "seed": seed, "on_row": on_row}
            history = fit(training, data, loss=loss, group=group, **more)
        _refuse_divergence(history)
        self.model_, self.history_, self.loss_ = training.model.eval(), history, loss
        self.n_iter_ = int(history.rows[-1]["step"])
        return data

    def _network(self, widths: Sequence[int], seed: int, dtype: torch.dtype) -> nn.Sequential:
        return mlp(widths[0], widths[1:-1], widths[-1], activation=self.activation, seed=seed, dtype=dtype)

    def _dataset(
        self, x: Array, y: Array, task: Task, classes: Sequence[str], dtype: torch.dtype, seed: int
    ) -> Dataset:
        names = tuple(map(str, getattr(self, "feature_names_in_", ())))
        checks.refuse_unusable_numbers(x, "X", names=names, limit=torch.finfo(dtype).max)
        kept, held = self._parts(len(x), y if classes else None, len(classes), seed)
        x_train = x if held is None else x[kept]
        mean, scale = scaling.feature_scaling(x_train, dtype, "X", names=names)
        units = _target_scaling(y[kept]) if task == "regression" else None
        labels = torch.from_numpy(y) if units is None else scaling.standardised(y, *units, dtype)
        return Dataset(
            name="X",
            train=Batch(_features(x_train, dtype), labels[kept]),
            validation=None if held is None else Batch(_features(x[held], dtype), labels[held]),
            test=None,
            task=task,
            mean=mean,
            scale=scale,
            classes=tuple(classes),
            target_mean=None if units is None else torch.from_numpy(units[0]),
            target_scale=None if units is None else torch.from_numpy(units[1]),
            feature_names=names,
        )

    def _parts(self, num_rows: int, codes: Array | None, num_classes: int, seed: int) -> tuple[Any, Array | None]:
        """The rows to train on (all, as a slice, or their numbers) and the rows held back."""
        if not isinstance(self.validation, Real) or not 0 <= self.validation < 1:
            raise BadInput(f"validation is the part of the rows that is held back, from 0 to 1, got {self.validation}")
        if not self.validation:
            if self.patience is not None:
                raise BadInput("patience looks at rows that are held back, and there are none; give validation=0.1 too")
            return slice(None), None
        held = round(float(self.validation) * num_rows)
        least = max(1, num_classes)
        if held < 1 or num_rows - held < least:
            raise BadInput(
                f"validation={self.validation:g} of {num_rows} rows leaves {num_rows - held} to train on and {held} "
                f"held back; at least {least} and 1 are needed"
            )
        order = ordering(num_rows, codes, seed, _VALIDATION)
        return order[:-held], order[-held:]

    def _method(self) -> Method:
        if self.method is None:
            return self._default()
        if isinstance(self.method, type) or not hasattr(self.method, "bind"):
            raise BadInput(f"method takes a recipe such as ADMM() or Adam(lr=1e-3), got {self.method!r}")
        return self.method

    def _hidden(self) -> list[int]:
        given = self.hidden
        fine = isinstance(given, Iterable) and not isinstance(given, str)
        widths = list(given) if fine else []
        if not fine or not all(isinstance(w, Integral) and not isinstance(w, bool) and w > 0 for w in widths):
            raise BadInput(
                f"hidden takes the widths of the hidden layers, for example (100,) or (64, 64), got {given!r}"
            )
        return [int(w) for w in widths]

    def _dtype(self) -> torch.dtype:
        if not isinstance(self.dtype, str) or self.dtype not in _DTYPES:
            raise BadInput(f"dtype must be 'float32' or 'float64', got {self.dtype!r}")
        return _DTYPES[self.dtype]

    def _loss(self, task: Task) -> Loss:
        """The loss asked for, else the method's own choice for the task, else the task's."""
        if not isinstance(self.loss, str):
            if isinstance(self.loss, type) or not hasattr(self.loss, "decide"):
                raise BadInput(f"loss takes a name or a loss such as Softmax(), got {self.loss!r}")
            return self.loss
        if self.loss != "auto":
            return losses.named(self.loss)
        own: Mapping[str, str] = getattr(type(self._method()), "auto_loss", {})
        return losses.named(own[task]) if task in own else losses.auto(task)

    def _limits(self, batches: str) -> dict[str, Any]:
        limits = {name: getattr(self, name) for name in ("steps", "epochs", "seconds", "patience")}
        if all(limit is None for limit in limits.values()):
            limits |= {"steps": STEPS} if batches == "full" else {"epochs": EPOCHS}
        return limits

    # -- applying ----------------------------------------------------------------------------------------------------

    def _outputs(self, X: Any) -> Tensor:
        """(n, k) float64 outputs of the network for raw features.

        They are worked out in float64 whatever the weights are, so that a row has the same outputs in any company."""
        z = self._applied(X, lambda model: model)
        if not bool(z.isfinite().all()):
            raise BadInput("the network's outputs are not finite for some of these rows; their features are extreme")
        return z

    def _applied(self, X: Any, part: Callable[[nn.Module], nn.Module]) -> Tensor:
        """(n, ...) what a part of the network, which starts at its beginning, gives for raw features; in float64."""
        check_is_fitted(self)
        x = validate_data(self, X, dtype=_ACCEPTED, reset=False)
        model = part(copy.deepcopy(self.model_).double())
        device, found = device_of(model), []
        with deployed(model):
            for start in range(0, len(x), TILE):
                rows = _features(x[start : start + TILE], torch.float64)
                found.append(model(rows.to(device)).cpu())
        return torch.cat(found)


class Classifier(ClassifierMixin, _Estimator):  # type: ignore[misc]
    """A fully connected network that decides between classes.

    Features are standardised inside the network, by the means and standard deviations of the training rows. The work is
    done in this process alone; neither NumPy's nor torch's global generator is drawn from.

    method: a recipe such as `ADMM(ridge=0.3)` or `Adam(lr=1e-3)`; None is `ADMM()`. Its settings are parameters too:
        `method__ridge`. A seed that the method has for itself is one of them.
    hidden: widths of the hidden layers; () for a linear model.
    activation: relu, leaky-relu, hard-sigmoid, tanh, sigmoid, sign or identity.
    loss: squared, hinge, logistic (two classes), softmax, or a loss such as `Softmax(label_smoothing=0.1)`, whose
        settings are parameters as well; auto is the method's own choice (squared for ADMM), else logistic for two
        classes and softmax for more.
    steps, epochs, seconds: limits; an epoch is a pass of mini-batches over the rows, or one step of a full-batch
        method. Without one, and without patience, it is 30 steps of a full-batch method and 30 epochs otherwise.
    batch_size: rows of a mini-batch; full-batch methods do not use it.
    validation: part of the rows, stratified, that is held back to be evaluated, from 0 to 1.
    patience: stop after so many evaluations (an epoch, or a full-batch step) without a better score on the rows held
        back, and keep the best network.
    random_state: decides the start weights, the order of the rows and which are held back: a whole number, a
        RandomState to draw one from, or None for another one each time.
    dtype: float32 or float64, of the weights and of the training.
    verbose: whether progress is reported on standard error.

    Attributes: `model_`, the deployed network, an nn.Module that takes raw features (n, d) and gives outputs (n, k),
    k = 1 for two classes except with softmax; `history_`, the `History` of the training; `n_iter_`, the steps taken;
    `loss_`; `classes_`; `n_features_in_` and `feature_names_in_`."""

    def fit(self, X: Any, y: Any) -> Self:
        """Train on features X (n, d) and labels y (n,) of any type.

        Raises ValueError (BadInput, CannotTrain) for data, parameters or a combination that cannot be used, and
        DidNotSolve when the training diverged."""
        x, y = validate_data(self, X, y, dtype=_ACCEPTED, ensure_min_samples=2)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise BadInput(f"y has one class, {self.classes_[0]!r}, in every row; a classifier needs at least two")
        task: Task = "binary" if len(self.classes_) == 2 else "multiclass"
        loss = self._loss(task)
        if isinstance(loss, Softmax):  # which gives two classes an output each
            task = "multiclass"
        self._train(x, codes.astype(np.int64), task, [str(label) for label in self.classes_], loss)
        return self

    def predict(self, X: Any) -> Array:
        """(n,) labels."""
        z = self._outputs(X)
        labels: Array = self.classes_[self.loss_.decide(z).numpy()]
        return labels

    def decision_function(self, X: Any) -> Array:
        """(n,) float64 for two classes: the second one where it is positive; otherwise (n, classes), the highest wins.

        These are the network's outputs, for two classes counted from where the loss decides: 1/2 for squared and hinge
        (whose targets are 0 and 1), 0 for logistic, equal outputs for softmax."""
        z = self._outputs(X)
        if len(self.classes_) > 2:
            return z.numpy()
        if z.shape[1] == 2:
            return (z[:, 1] - z[:, 0]).numpy()
        return (z[:, 0] - (0.5 if isinstance(self.loss_, Squared | Hinge) else 0.0)).numpy()

    def _has_probabilities(self) -> bool:
        try:
            loss = self.loss_ if hasattr(self, "loss_") else self._loss("binary")
        except BadInput:
            return False
        if not isinstance(loss, Softmax | Logistic):
            raise AttributeError(
                f"the {loss.name} loss gives no probabilities; use loss='softmax' (any number of classes) or 'logistic'"
            )
        return True

    @available_if(_has_probabilities)  # type: ignore[untyped-decorator]
    def predict_proba(self, X: Any) -> Array:
        """(n, classes) float64 probabilities; only with the softmax and the logistic loss."""
        z = self._outputs(X)
        if z.shape[1] == 1:
            return torch.cat([torch.sigmoid(-z), torch.sigmoid(z)], dim=1).numpy()
        return torch.softmax(z, dim=1).numpy()


class Regressor(RegressorMixin, _Estimator):  # type: ignore[misc]
    """A fully connected network that predicts numbers, one or several a row.

    Features are standardised inside the network, and targets around it, by the means and standard deviations of the
    training rows; predictions are in the units of the targets. The parameters are those of `Classifier`, except that
    the loss can only be squared (or auto, which is the same) or one of one's own; `patience` goes by R².

    Attributes: `model_`, the deployed network, an nn.Module that takes raw features (n, d) and gives outputs z (n, k),
    which stand for z * target_scale_ + target_mean_; `target_mean_`, `target_scale_`, both (k,); `history_`, `n_iter_`,
    `loss_`, `n_features_in_` and `feature_names_in_` as there."""

    def fit(self, X: Any, y: Any) -> Self:
        """Train on features X (n, d) and targets y, (n,) or (n, k).

        Raises ValueError (BadInput, CannotTrain) for data, parameters or a combination that cannot be used, and
        DidNotSolve when the training diverged."""
        x, y = validate_data(self, X, y, dtype=_ACCEPTED, multi_output=True, y_numeric=True, ensure_min_samples=2)
        targets = np.asarray(y, dtype=np.float64)
        self._flat = targets.ndim == 1
        data = self._train(x, targets.reshape(len(targets), -1), "regression", (), self._loss("regression"))
        assert data.target_mean is not None
        assert data.target_scale is not None
        self.target_mean_, self.target_scale_ = data.target_mean.numpy(), data.target_scale.numpy()
        return self

    def predict(self, X: Any) -> Array:
        """(n,) or (n, k) float64, as the targets were, in their units."""
        z = self._outputs(X).numpy()
        numbers: Array = z * self.target_scale_ + self.target_mean_
        return numbers[:, 0] if self._flat else numbers

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


_ACCEPTED = [np.float64, np.float32, np.uint8]
"""Features that are taken as they are; anything else becomes float64."""


def _features(x: Array, dtype: torch.dtype) -> Tensor:
    """The rows as a tensor that may share their memory: bytes as they are, anything else in `dtype`."""
    kind = x.dtype if x.dtype == np.uint8 else np.float64 if dtype == torch.float64 else np.float32
    rows = np.ascontiguousarray(x, dtype=kind)
    return torch.from_numpy(rows if rows.flags.writeable else rows.copy())


def _target_scaling(y: Array) -> tuple[Array, Array]:
    """(mean, scale), both (k,) float64, of targets (n, k); a target that never varies has scale 1."""
    mean, spread = scaling.moments(y)
    if not (np.isfinite(mean).all() and np.isfinite(spread).all()):
        raise BadInput("the targets are too far apart to be standardised; rescale them")
    return mean, np.where(spread > 10 * np.finfo(np.float64).eps * np.abs(mean), spread, 1.0)


def _seed(random_state: Any) -> int:
    if random_state is None:
        return int(np.random.default_rng().integers(2**31))
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31 - 1))
    if not isinstance(random_state, Integral) or isinstance(random_state, bool) or not 0 <= int(random_state) < 2**63:
        raise BadInput(
            f"random_state must be a whole number from 0 to 2^63 - 1, a RandomState or None, got {random_state!r}"
        )
    return int(random_state)


def _refuse_divergence(history: History) -> None:
    deployed_row = next((row for row in history.rows if row["step"] == history.deployed_step), history.rows[-1])
    if deployed_row["train"]["loss"] is None:
        raise DidNotSolve(
            f"the training diverged: the loss was not finite at step {deployed_row['step']}; lower the learning rate "
            "(method__lr) if the method has one, or try dtype='float64'"
        )
