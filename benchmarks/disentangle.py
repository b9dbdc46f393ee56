"""What the factors of a network know that it was never told: `python benchmarks/disentangle.py digits`.

Networks see a weak label: parity, a coarse garment, or who is in the picture. The table asks their codes for the digit,
the garment, the attributes of faces never seen, or whether two pictures are of one person never seen.

All rows of a table share encoder, start, mini-batches, epochs, rate, smoothing of labels and weight of the decoder.
Settings were chosen on validation rows. Of digits, the 500 test rows are the same for every seed, and no training or
choice has seen them; training and validation rows are drawn anew from the other 1297. Cartoon faces are drawn anew,
people included; settings were chosen on the unseen people of other draws, seeds from 100. In cartoon-correlated some
attributes come together in training, and not among the held-out tuples. There, on Olivetti and with --rank nothing was
chosen: the settings are those of the cartoon faces and of the set's own rank. Factors and probes are fitted on training
rows."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

import attribute_sets
import disentangle_rows as rows
import report
from attribute_sets import Array, AttributeSet
from disentangle_rows import Coded, Setting
from piecework import disentangle as d

Figures = dict[str, float | None]
Row = Callable[[AttributeSet, Setting, int], Coded]


@dataclass(frozen=True)
class Task:
    """make: the data set of a seed; figures: of a row, `main` those with a range; setting: of all rows; ways: settings
    of DeepFacto; decoderless: the way that is shown without sparsity and without a decoder, too; common: the part
    of seed 0 whose codes are compared over the seeds; shuffled: the way that is shown with shuffled labels, too."""

    make: Callable[[int], AttributeSet]
    figures: Callable[[AttributeSet, Coded], Figures]
    main: tuple[str, ...]
    setting: Setting
    ways: dict[str, dict[str, Any]]
    decoderless: str
    common: str
    seeds: int
    shuffled: str = "implicit"


# -- figures -----------------------------------------------------------------------------------------------------------


def label_accuracy(found: AttributeSet, coded: Coded) -> float:
    """Of the deployed network; of a linear probe on the codes where there is none."""
    if coded.labels is not None:
        return float(np.mean(coded.labels["test"] == found.test.label))
    return d.linear_probe(coded.codes["train"], found.train.label, coded.codes["test"], found.test.label).score


def pixels_left(found: AttributeSet, coded: Coded, name: str) -> float:
    """The share of the pixels' variance that a linear decoder, fitted on the training rows, leaves unexplained."""
    parts = {"train": found.train, name: getattr(found, name)}
    with_one = {key: np.column_stack([coded.codes[key], np.ones(len(part))]) for key, part in parts.items()}
    weights = np.linalg.lstsq(with_one["train"], parts["train"].x, rcond=1e-6)[0]
    x = parts[name].x
    return float(np.square(with_one[name] @ weights - x).sum() / np.square(x - x.mean(0)).sum())


def shared(found: AttributeSet, coded: Coded, name: str) -> Figures:
    return {
        "MIG": float(np.nanmean(d.mig(*pairs(found, coded, name, "attributes")))),
        "SAP": float(np.nanmean(d.sap(*pairs(found, coded, name, "attributes")))),
        **described(found, coded, name),
    }


def described(found: AttributeSet, coded: Coded, name: str) -> Figures:
    error = coded.errors[name]
    return {
        "NMF error": None if np.isnan(error) else error,
        "pixels left": pixels_left(found, coded, name),
        "zeros": d.zeros(coded.codes[name]),
        "code gap": coded.gap,
    }


def pairs(found: AttributeSet, coded: Coded, name: str, what: str) -> tuple[Array, Array, Array, Array]:
    part = getattr(found, name)
    return coded.codes["train"], getattr(found.train, what), coded.codes[name], getattr(part, what)


def of_classes(found: AttributeSet, coded: Coded) -> Figures:
    groups = (found.train.groups, found.test.groups)
    sparse = d.linear_probe(*pairs(found, coded, "test", "fine"), penalty="l1", inverse_penalty=0.1)
    return {
        "label": label_accuracy(found, coded),
        "AUC in group": d.single_factor_auc(*pairs(found, coded, "test", "attributes"), groups=groups).mean,
        "probe L2": d.linear_probe(*pairs(found, coded, "test", "fine")).score,
        "probe L1": sparse.score,
        "factors for 95 %": float(d.factors_needed(*pairs(found, coded, "test", "fine")).num),
        **shared(found, coded, "test"),
    }


def of_attributes(found: AttributeSet, coded: Coded) -> Figures:
    unseen, held = found.unseen, found.unseen_held_out
    assert unseen is not None
    single = d.single_factor_auc(*pairs(found, coded, "unseen", "attributes"))
    scores = single.scores(coded.codes["unseen"])
    return {
        "person": label_accuracy(found, coded),
        "AUC": single.mean,
        "held-out tuples": float(np.nanmean(d.auc(scores[held], unseen.attributes[held]))),
        "probe L2": d.linear_probe(*pairs(found, coded, "unseen", "attributes"), score="auc").score,
        "probe L1": d.linear_probe(
            *pairs(found, coded, "unseen", "attributes"), score="auc", penalty="l1", inverse_penalty=0.1
        ).score,
        "factors for 95 %": float(d.factors_needed(*pairs(found, coded, "unseen", "attributes")).num),
        "smile AUC": d.single_factor_auc(*pairs(found, coded, "unseen", "control")).mean,
        "smile probe": d.linear_probe(*pairs(found, coded, "unseen", "control"), score="auc").score,
        **shared(found, coded, "unseen"),
    }


def of_people(found: AttributeSet, coded: Coded) -> Figures:
    unseen = found.unseen
    assert unseen is not None
    return {
        "person": label_accuracy(found, coded),
        "1-NN": d.nearest(*pairs(found, coded, "test", "label")),
        "pair AUC": d.pair_auc(coded.codes["unseen"], unseen.label),
        "one-shot": d.one_shot(coded.codes["unseen"], unseen.label),
        "purity": float(d.top_purity(coded.codes["train"], found.train.label).mean()),
        **described(found, coded, "unseen"),
    }


# -- the table ---------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "block-admm": {"coupling": 10.0, "sweeps": 2, "local_steps": 2, "code_steps": 10},
    "envelope": {"coupling": 10.0, "code_steps": 10},
    "contrast": {"coupling": 100.0, "code_steps": 10},
    "implicit": {},
}
OF_FACES: dict[str, dict[str, Any]] = {
    **WAYS,
    "block-admm": {**WAYS["block-admm"], "coupling": 1.0},
    "envelope": {**WAYS["envelope"], "coupling": 1.0},
    "contrast": {**WAYS["contrast"], "coupling": 10.0},
}
"""At a reconstruction of the weight that digits take, and at their couplings, all features of faces become 0."""
SPARSITY = 0.05
TASKS = {
    "digits": Task(
        partial(attribute_sets.digits, test_seed=0),
        of_classes,
        ("label", "AUC in group", "probe L2", "NMF error"),
        Setting(epochs=60, label_smoothing=0.1),
        WAYS,
        "block-admm",
        "test",
        5,
    ),
    "fashion": Task(
        partial(attribute_sets.fashion, rows=6000, test_rows=2000),
        of_classes,
        ("label", "AUC in group", "probe L2", "NMF error"),
        Setting(epochs=20, label_smoothing=0.1, batch_size=128),
        WAYS,
        "implicit",
        "test",
        3,
    ),
    "cartoon": Task(
        attribute_sets.cartoon,
        of_attributes,
        ("person", "AUC", "probe L2", "NMF error"),
        Setting(hidden=(256, 64), rank=32, epochs=60, reconstruction=0.1, label_smoothing=0.1, centred=True),
        OF_FACES,
        "contrast",
        "unseen",
        10,
        "contrast",
    ),
    "olivetti": Task(
        attribute_sets.olivetti,
        of_people,
        ("person", "pair AUC", "one-shot", "NMF error"),
        Setting(
            hidden=(256, 64),
            rank=32,
            epochs=80,
            batch_size=42,
            reconstruction=0.1,
            label_smoothing=0.1,
            centred=True,
        ),
        OF_FACES,
        "contrast",
        "unseen",
        10,
        "contrast",
    ),
}
TASKS["cartoon-correlated"] = replace(TASKS["cartoon"], make=partial(attribute_sets.cartoon, correlation=0.5), seeds=5)


def rows_of(task: Task) -> dict[str, Row]:
    """The rows, controls first."""
    table: dict[str, Row] = {
        "pixels: NMF": rows.of_pixels("nmf"),
        "pixels: PCA": rows.of_pixels("pca"),
        "untrained encoder: NMF": rows.post_hoc("nmf", decoder=False, train=False),
        "encoder: NMF": rows.post_hoc("nmf", decoder=False),
        "encoder: PCA": rows.post_hoc("pca", decoder=False),
        "encoder with decoder: NMF": rows.post_hoc("nmf", decoder=True),
        "encoder with decoder: PCA": rows.post_hoc("pca", decoder=True),
        "ReLU bottleneck": rows.bottleneck(decoder=False),
        "ReLU bottleneck with decoder": rows.bottleneck(decoder=True),
        "NMF layer, derivative of one step, decoder": rows.one_step,
        "NMF layer, fixed random dictionary, decoder": rows.deepfacto(fixed=True, through="implicit"),
    }
    for way, settings in task.ways.items():
        table[f"DeepFacto, {way}, decoder, sparsity"] = rows.deepfacto(through=way, sparsity=SPARSITY, **settings)
    way, settings = task.decoderless, task.ways[task.decoderless]
    table[f"DeepFacto, {way}, decoder"] = rows.deepfacto(through=way, **settings)
    table[f"DeepFacto, {way}, no decoder"] = rows.deepfacto(through=way, decoder=0.0, **settings)
    way = task.shuffled
    table[f"DeepFacto, {way}, decoder, sparsity, shuffled labels"] = rows.deepfacto(
        through=way, sparsity=SPARSITY, permuted=True, **task.ways[way]
    )
    return table


def row_of(task: Task, sets: list[AttributeSet], row: Row) -> dict[str, Any]:
    common = torch.from_numpy(getattr(sets[0], task.common).x).float()
    setting = replace(task.setting, common=common)
    coded = [row(found, setting, seed) for seed, found in enumerate(sets)]
    figures = [task.figures(found, one) for found, one in zip(sets, coded, strict=True)]
    cells: dict[str, Any] = {}
    for name in figures[0]:
        values = [one[name] for one in figures]
        if values[0] is None:
            cells[name] = None
        else:
            cells[name] = report.spread(values, 3) if name in task.main else round(float(np.median(values)), 3)
    if len(sets) > 1:
        again = d.stability([one.codes["common"] for one in coded])
        cells["stability (chance)"] = f"{again.mean:.2f} ({again.null:.2f})"
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--rank", type=int, default=None, help="factors in every row, in place of the set's own number")
    parser.add_argument("--only", nargs="+", default=[], help="rows by their names; writes no file without --name")
    parser.add_argument("--name", default=None, help="of the file that is written, without .md")
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    if unknown := sorted({*arguments.only} - {*rows_of(task)}):
        parser.error(f"{arguments.task} has no row {unknown[0]!r}; its rows: {', '.join(map(repr, rows_of(task)))}")
    name = f"disentangle-{arguments.task}"
    if arguments.rank is not None:
        task = replace(task, setting=replace(task.setting, rank=arguments.rank))
        name += f"-rank-{arguments.rank}"
    seeds = task.seeds if arguments.seeds is None else arguments.seeds
    sets = [task.make(seed) for seed in range(seeds)]
    header: list[str] = []
    lines: list[list[Any]] = []
    for title, row in rows_of(task).items():
        if arguments.only and title not in arguments.only:
            continue
        began = time.process_time()
        cells = row_of(task, sets, row)
        header = ["", *cells]
        lines.append([title, *cells.values()])
        print(f"{time.process_time() - began:.0f} s", *(report.show(cell) for cell in lines[-1]), sep=" | ", flush=True)
    if arguments.name is not None or not arguments.only:
        shared = replace(task.setting, common=None)
        text = f"Medians [least, most] of seeds 0..{seeds - 1}. Shared: {shared}. DeepFacto: {task.ways}."
        report.write(arguments.name or name, "What factors know that was not told", [(text, header, lines)])


if __name__ == "__main__":
    main()
