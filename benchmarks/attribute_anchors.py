"""What NMF and PCA of the pixels know: `python benchmarks/attribute_anchors.py`. The floor of every such table.

Nothing is chosen here: ranks and settings are fixed, so the validation rows are not used."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import attribute_sets
import report
from attribute_sets import Array, AttributeSet
from piecework import disentangle as d


def factorised(parts: Sequence[Array], kind: str, rank: int, seed: int) -> tuple[list[Array], list[float]]:
    """Codes and relative errors of each part by a model of the first. kind: "nmf", "pca" or "pixels".

    The dictionary's columns have length 1, the codes their scale: likeness of codes depends on it."""
    from sklearn.decomposition import NMF, PCA
    from sklearn.exceptions import ConvergenceWarning

    if kind == "pixels":
        return list(parts), [0.0] * len(parts)
    model: Any = PCA(rank, random_state=seed)
    if kind == "nmf":
        model = NMF(rank, init="nndsvda", max_iter=400, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(parts[0])
        codes = [model.transform(part) for part in parts]
    errors = [d.relative_error(x, model.inverse_transform(s)) for x, s in zip(parts, codes, strict=True)]
    size = np.linalg.norm(model.components_, axis=1)
    return [s * size for s in codes], errors


def of_classes(found: AttributeSet, kind: str, rank: int, seed: int) -> dict[str, float]:
    """The row of digits or fashion."""
    train, test = found.train, found.test
    (s, t), errors = factorised([train.x, test.x], kind, rank, seed)
    groups = (train.groups, test.groups)
    single = d.single_factor_auc(s, train.attributes, t, test.attributes, groups=groups)
    return {
        "weak label": d.linear_probe(s, train.label, t, test.label).score,
        "AUC within groups": single.mean,
        "fine probe L2": d.linear_probe(s, train.fine, t, test.fine).score,
        "L1": d.linear_probe(s, train.fine, t, test.fine, penalty="l1").score,
        "factors for 95 %": d.factors_needed(s, train.fine, t, test.fine).num if rank <= 32 else np.nan,
        "MIG": float(np.nanmean(d.mig(s, train.attributes, t, test.attributes))),
        "SAP": float(np.nanmean(d.sap(s, train.attributes, t, test.attributes))),
        "error": errors[1],
        "zeros": d.zeros(t),
    }


def of_people(found: AttributeSet, kind: str, rank: int, seed: int) -> dict[str, float]:
    """The row of Olivetti."""
    train, test, unseen = found.train, found.test, found.unseen
    assert unseen is not None
    (s, t, u), errors = factorised([train.x, test.x, unseen.x], kind, rank, seed)
    return {
        "person, logistic": d.linear_probe(s, train.label, t, test.label).score,
        "1-NN": d.nearest(s, train.label, t, test.label),
        "unseen pair AUC": d.pair_auc(u, unseen.label),
        "unseen one-shot": d.one_shot(u, unseen.label),
        "error train": errors[0],
        "test": errors[1],
        "unseen": errors[2],
        "purity": float(d.top_purity(s, train.label).mean()),
        "zeros": d.zeros(t),
    }


def of_attributes(found: AttributeSet, kind: str, rank: int, seed: int) -> dict[str, float]:
    """The row of cartoon faces: factors chosen on training people, reported on unseen ones."""
    train, test, unseen = found.train, found.test, found.unseen
    assert unseen is not None
    assert train.control is not None
    assert unseen.control is not None
    (s, t, u), errors = factorised([train.x, test.x, unseen.x], kind, rank, seed)
    held = found.unseen_held_out
    single = d.single_factor_auc(s, train.attributes, u, unseen.attributes)
    scores = single.scores(u)
    dci = d.dci(s, train.attributes, u, unseen.attributes)
    return {
        "AUC unseen": single.mean,
        "held-out tuples": float(np.nanmean(d.auc(scores[held], unseen.attributes[held]))),
        "probe AUC L2": d.linear_probe(s, train.attributes, u, unseen.attributes, score="auc").score,
        "L1": d.linear_probe(s, train.attributes, u, unseen.attributes, score="auc", penalty="l1").score,
        "smile AUC": d.single_factor_auc(s, train.control, u, unseen.control).mean,
        "smile probe AUC": d.linear_probe(s, train.control, u, unseen.control, score="auc").score,
        "MIG": float(np.nanmean(d.mig(s, train.attributes, u, unseen.attributes))),
        "SAP": float(np.nanmean(d.sap(s, train.attributes, u, unseen.attributes))),
        "DCI d": dci.disentanglement,
        "DCI c": dci.completeness,
        "person, 1-NN": d.nearest(s, train.label, t, test.label),
        "error unseen": errors[2],
        "zeros": d.zeros(u),
    }


Row = Callable[[AttributeSet, str, int, int], dict[str, float]]
SETS: dict[str, tuple[Callable[[int], AttributeSet], Row, tuple[tuple[str, int], ...]]] = {
    "digits": (attribute_sets.digits, of_classes, (("nmf", 16), ("pca", 16), ("pixels", 64))),
    "fashion": (attribute_sets.fashion, of_classes, (("nmf", 16), ("pca", 16))),
    "olivetti": (attribute_sets.olivetti, of_people, (("pixels", 1024), ("nmf", 32), ("pca", 32), ("nmf", 64))),
    "cartoon": (attribute_sets.cartoon, of_attributes, (("nmf", 32), ("pca", 32))),
}


def table(name: str, seeds: int) -> tuple[str, list[str], list[list[object]]]:
    """A section of the report: means over splits, and their standard deviation."""
    make, row, models = SETS[name]
    sets = [make(seed) for seed in range(seeds)]
    rows: list[list[object]] = []
    header: list[str] = []
    for kind, rank in models:
        found = [row(each, kind, rank, seed) for seed, each in enumerate(sets)]
        header = ["", *found[0]]
        cells = [[each[figure] for each in found] for figure in found[0]]
        rows.append(
            [
                f"{kind}, r = {rank}",
                *("-" if np.isnan(c).any() else f"{np.mean(c):.3f} ± {np.std(c):.3f}" for c in cells),
            ]
        )
        print(name, rows[-1], flush=True)
    return f"{name}, seeds 0..{seeds - 1}: mean ± standard deviation over the splits", header, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="*", default=["digits", "olivetti", "cartoon"], help=", ".join(SETS))
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    sections = [table(name, arguments.seeds) for name in arguments.sets]
    report.write("attribute-anchors", "NMF and PCA of the pixels: what is known without training", sections)


if __name__ == "__main__":
    main()
