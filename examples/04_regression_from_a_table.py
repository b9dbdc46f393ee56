"""A regression with scikit-learn's interface: `python 04_regression_from_a_table.py --data diabetes`.

`Regressor(GaussNewton(), validation=0.1, patience=25)` standardises features and targets, holds rows back for stopping,
and gives a plain torch module in `model_`. Beside it: Adam on the same network, and linear regression.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np
from sklearn.datasets import fetch_california_housing, load_diabetes
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import train_test_split

from piecework import Adam, GaussNewton, Regressor


def table(name: str) -> tuple[np.ndarray, np.ndarray]:
    if name == "diabetes":
        return load_diabetes(return_X_y=True)
    if name == "housing":  # downloaded by scikit-learn the first time
        return fetch_california_housing(return_X_y=True)
    generator = np.random.default_rng(0)  # Friedman's first function, without noise
    x = generator.uniform(size=(4000, 10))
    y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    return x, y


def main(words: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=["friedman", "diabetes", "housing"], default="friedman")
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args(words)
    x, y = table(arguments.data)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, random_state=0)

    shared = {"hidden": (32, 32), "activation": "tanh", "seconds": arguments.seconds, "validation": 0.1, "patience": 25}
    entries = {
        "linear regression": LinearRegression(),
        "Adam": Regressor(Adam(lr=3e-3), **shared),
        "Gauss-Newton": Regressor(GaussNewton(), **shared),
    }
    for name, entry in entries.items():
        began = time.perf_counter()
        score = entry.fit(x_train, y_train).score(x_test, y_test)
        print(f"{name:18} R2 {score:.5f} on the test rows, {time.perf_counter() - began:.1f} s")
    return float(score)


if __name__ == "__main__":
    main()
