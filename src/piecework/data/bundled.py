"""The data sets that come with scikit-learn, and so are always there."""

from __future__ import annotations

from typing import Any

import numpy as np

from .source import Source

DESCRIPTIONS = {
    "digits": ("handwritten digits, pictures of 8 x 8", "1,797 x 64, 10 classes", "UCI, CC BY 4.0"),
    "breast_cancer": ("Wisconsin breast cancer, measurements of cell nuclei", "569 x 30, 2 classes", "UCI, CC BY 4.0"),
    "wine": ("chemical analysis of three cultivars", "178 x 13, 3 classes", "UCI, CC BY 4.0"),
    "diabetes": ("progression of diabetes after a year", "442 x 10, a number", "Efron et al. 2004"),
}
"""name -> what it is, size, origin and licence."""


def read(name: str) -> Source:
    """One of DESCRIPTIONS. Labels are the names that scikit-learn gives them, sorted: `benign` is class 0."""
    from sklearn import datasets

    if name == "diabetes":
        bunch: Any = datasets.load_diabetes(scaled=False)
        return Source(
            name=name,
            x=np.array(bunch.data, dtype=np.float64),
            y=np.array(bunch.target, dtype=np.float64),
            task="regression",
            feature_names=tuple(map(str, bunch.feature_names)),
            target_name="progression",
        )
    load = {"digits": datasets.load_digits, "breast_cancer": datasets.load_breast_cancer, "wine": datasets.load_wine}
    bunch = load[name]()
    labels = np.array([str(n) for n in bunch.target_names])
    return Source(
        name=name,
        x=np.array(bunch.data, dtype=np.float64),
        y=np.array(bunch.target) if name == "digits" else labels[bunch.target],
        task="binary" if len(labels) == 2 else "multiclass",
        white=16.0 if name == "digits" else None,
        feature_names=() if name == "digits" else tuple(map(str, bunch.feature_names)),
        target_name=None if name == "digits" else "class",
    )
