"""`FactorClassifier`: a classifier for scikit-learn that decides by non-negative factors, and gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from torch import nn

from .data.source import Array
from .estimators import Classifier
from .factors import parts
from .losses import Loss
from .methods import DeepFacto
from .models import mlp
from .training import Method


class FactorClassifier(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Classifier):  # type: ignore[misc]
    """A network whose last layer sees non-negative factors of the hidden features alone; `transform` gives them.

    Between the last hidden layer and the output stands an NMF layer (`piecework.nn.NMF`). Factors do not know the
    label: those of a training row are worked out as those of a new one.

    method: a recipe that trains such a network, such as `DeepFacto(decoder=2.0)` or `Adam()`; None is `DeepFacto()`.
    factors: rank of the layer, at most the width of the last hidden layer.
    The other parameters are those of `Classifier`; the activation must be relu, hard-sigmoid or sigmoid.

    Attributes: `dictionary_`, (width of the last hidden layer, factors), unit columns; and those of `Classifier`."""

    _default: ClassVar[type[Method]] = DeepFacto

    def __init__(
        self,
        method: Method | None = None,
        *,
        factors: int = 16,
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
        super().__init__(
            method,
            hidden=hidden,
            activation=activation,
            loss=loss,
            steps=steps,
            epochs=epochs,
            seconds=seconds,
            batch_size=batch_size,
            validation=validation,
            patience=patience,
            random_state=random_state,
            dtype=dtype,
            verbose=verbose,
        )
        self.factors = factors

    def transform(self, X: Any) -> Array:
        """(n, factors) float64: the non-negative codes of rows X (n, d)."""

        def codes(model: nn.Module) -> nn.Module:
            found = parts(model)
            return nn.Sequential(*found.encoder, found.nmf)

        found: Array = self._applied(X, codes).numpy()
        return found

    @property
    def dictionary_(self) -> Array:
        """(width of the last hidden layer, factors): what one unit of each factor is in hidden features."""
        found: Array = parts(self.model_).nmf.dictionary.double().cpu().numpy()
        return found

    @property
    def _n_features_out(self) -> int:
        """How many columns `transform` gives, for scikit-learn."""
        return self.factors

    def _network(self, widths: Sequence[int], seed: int, dtype: torch.dtype) -> nn.Sequential:
        return mlp(
            widths[0],
            widths[1:-1],
            widths[-1],
            activation=self.activation,
            factors=self.factors,
            seed=seed,
            dtype=dtype,
        )
