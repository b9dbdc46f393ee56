"""The ways to non-negative codes that `disentangle.py` compares: each gives the codes of all parts of a data set.

All networks of a table have the same encoder, start, mini-batches, rate and weight of the decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import piecework
from attribute_sets import Array, AttributeSet
from piecework import Batch, DeepFacto, losses
from piecework import disentangle as d
from piecework.models import mlp
from piecework.nn import NMF, Standardise
from piecework.solvers.nmf import nmf
from piecework.solvers.nnls import nnls
from piecework.training import stream

RIDGE = 1e-3


@dataclass(frozen=True)
class Setting:
    """What the rows of a table share. hidden: widths of the encoder; rank: of all codes; decoder: weight of the part
    of the pixels' variance that a linear decoder leaves unexplained; reconstruction: nu of the NMF layers; layer: more
    settings of theirs."""

    hidden: tuple[int, ...] = (128, 64)
    rank: int = 16
    epochs: int = 60
    batch_size: int = 64
    lr: float = 3e-3
    decoder: float = 2.0
    reconstruction: float = 4.0
    label_smoothing: float = 0.0
    centred: bool = False
    """Whether the encoder sees pixels less their training mean, in units of their root mean variance."""
    common: Tensor | None = None
    """Rows (n, d) that all codes are compared on, for their stability."""
    layer: dict[str, Any] = field(default_factory=dict)


@dataclass
class Coded:
    """Codes of the parts by name, (n, r); errors: relative, of what was factorised; labels: what the network says of
    each part, None where there is no network and a linear probe stands in for its head; gap: accuracy that codes which
    have seen the label would have scored more, over the last epoch."""

    codes: dict[str, Array]
    errors: dict[str, float]
    labels: dict[str, Array] | None = None
    gap: float | None = None
    dictionary: Array | None = None


def parts_of(found: AttributeSet, setting: Setting) -> dict[str, Tensor]:
    parts = {"train": found.train, "validation": found.validation, "test": found.test, "unseen": found.unseen}
    rows = {name: torch.from_numpy(part.x).float() for name, part in parts.items() if part is not None}
    return rows if setting.common is None else {**rows, "common": setting.common}


def batches(found: AttributeSet, setting: Setting, seed: int, y: Array | None = None) -> Any:
    """Batches (x, y) of all epochs; a remainder of the rows is left out, another one in each epoch."""
    x = parts_of(found, setting)["train"]
    labels = torch.from_numpy(found.train.label if y is None else y)
    generator = stream(seed, 77)
    for _ in range(setting.epochs):
        order = torch.randperm(len(x), generator=generator)
        for rows in order[: len(x) - len(x) % setting.batch_size].split(setting.batch_size):
            yield x[rows], labels[rows]


def num_steps(found: AttributeSet, setting: Setting) -> int:
    return setting.epochs * (len(found.train) // setting.batch_size)


def network(
    found: AttributeSet, setting: Setting, seed: int, *, factors: bool, bottleneck: bool = False
) -> nn.Sequential:
    hidden = (*setting.hidden, setting.rank) if bottleneck else setting.hidden
    x = parts_of(found, setting)["train"]
    rank = setting.rank if factors else None
    whole = mlp(x.shape[1], hidden, int(found.train.label.max()) + 1, factors=rank, seed=seed)
    if not setting.centred:
        return whole
    return nn.Sequential(Standardise(x.mean(0), x.var(0).mean().sqrt().expand(x.shape[1])), *whole)


def nmf_layer(model: nn.Sequential, kind: type[NMF], setting: Setting, seed: int) -> int:
    """Put a layer of this kind in the place of the network's NMF layer: which is returned."""
    place = next(number for number, module in enumerate(model) if isinstance(module, NMF))
    model[place] = kind(model[place].features, setting.rank, seed=seed, **setting.layer)
    return place


# -- the pixels, and features as they are ------------------------------------------------------------------------------


def factorised(parts: dict[str, Tensor], kind: str, rank: int, seed: int) -> Coded:
    """NMF, PCA, or nothing at all, of rows (n, d): fitted on the training part. Unit columns."""
    if kind == "as it is":
        return Coded({name: x.numpy() for name, x in parts.items()}, dict.fromkeys(parts, float("nan")))
    if kind == "pca":
        from sklearn.decomposition import PCA

        model = PCA(min(rank, *parts["train"].shape), random_state=seed).fit(parts["train"].numpy())
        codes = {name: model.transform(x.numpy()) for name, x in parts.items()}
        errors = {name: d.relative_error(x, model.inverse_transform(codes[name])) for name, x in parts.items()}
        return Coded(codes, errors, dictionary=model.components_.T)
    dictionary = nmf(
        parts["train"].double(), rank, ridge=RIDGE, seed=seed, tolerance=1e-4, max_iterations=300
    ).dictionary
    return coded_by(parts, dictionary)


def coded_by(parts: dict[str, Tensor], dictionary: Tensor) -> Coded:
    codes = {name: nnls(x.double(), dictionary, ridge=RIDGE).x for name, x in parts.items()}
    errors = {name: d.relative_error(x, codes[name] @ dictionary.T) for name, x in parts.items()}
    return Coded({name: s.numpy() for name, s in codes.items()}, errors, dictionary=dictionary.numpy())


def of_pixels(kind: str) -> Callable[[AttributeSet, Setting, int], Coded]:
    return lambda found, setting, seed: factorised(parts_of(found, setting), kind, setting.rank, seed)


# -- backpropagation ---------------------------------------------------------------------------------------------------


def backpropagated(
    found: AttributeSet, setting: Setting, seed: int, *, decoder: float, bottleneck: bool = False, train: bool = True
) -> tuple[dict[str, Tensor], dict[str, Array]]:
    """The last hidden features of each part and the network's decisions: trained end to end, with a linear decoder from
    those features where its weight is not 0. bottleneck: a last hidden layer of as many units as there are factors."""
    whole = network(found, setting, seed, factors=False, bottleneck=bottleneck)
    encoder, head = whole[:-1], whole[-1:]
    parts = parts_of(found, setting)
    if train:
        trained(found, setting, seed, encoder, head, decoder)
    with torch.no_grad():
        features = {name: encoder(rows) for name, rows in parts.items()}
        said = {name: head(h).argmax(1).numpy() for name, h in features.items()}
    return features, said


def trained(
    found: AttributeSet,
    setting: Setting,
    seed: int,
    encoder: nn.Sequential,
    head: nn.Sequential,
    decoder: float,
    *,
    reconstruction: float = 0.0,
) -> None:
    """Adam on encoder, head and decoder. reconstruction: weight of the error of a last NMF layer in the encoder."""
    front = encoder[0] if setting.centred else nn.Identity()
    x = front(parts_of(found, setting)["train"])
    decode = nn.Linear(head[0].in_features, x.shape[1])
    with torch.no_grad():
        start = torch.randn(decode.weight.shape, generator=stream(seed, 2), dtype=torch.float64)
        decode.weight.copy_(start * (0.1 / head[0].in_features ** 0.5))
        decode.bias.copy_(x.mean(0))
    variance = (x - x.mean(0)).square().sum() / len(x)
    weights = [one for module in (encoder, head, decode) for one in module.parameters()]
    optimizer = torch.optim.Adam(weights, lr=setting.lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, num_steps(found, setting), eta_min=setting.lr / 100
    )
    loss = nn.CrossEntropyLoss(label_smoothing=setting.label_smoothing)
    for rows, labels in batches(found, setting, seed):
        h = encoder(rows)
        total = loss(head(h), labels)
        if decoder:
            total = total + decoder / variance * (decode(h) - front(rows)).square().sum() / len(rows)
        if reconstruction:
            missing = encoder[-1].input - encoder[-1].reconstruct(h.detach())
            total = total + reconstruction / 2 * missing.square().sum() / len(rows)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()


def post_hoc(kind: str, *, decoder: bool, train: bool = True) -> Callable[[AttributeSet, Setting, int], Coded]:
    """NMF or PCA of the features of a network that knows nothing of it."""

    def row(found: AttributeSet, setting: Setting, seed: int) -> Coded:
        weight = setting.decoder if decoder else 0.0
        features, _ = backpropagated(found, setting, seed, decoder=weight, train=train)
        return factorised(features, kind, setting.rank, seed)

    return row


def bottleneck(*, decoder: bool) -> Callable[[AttributeSet, Setting, int], Coded]:
    """The units of a last hidden layer of ReLUs as they are."""

    def row(found: AttributeSet, setting: Setting, seed: int) -> Coded:
        weight = setting.decoder if decoder else 0.0
        features, said = backpropagated(found, setting, seed, decoder=weight, bottleneck=True)
        coded = factorised(features, "as it is", setting.rank, seed)
        coded.labels = said
        return coded

    return row


def one_step(found: AttributeSet, setting: Setting, seed: int) -> Coded:
    """The NMF layer with the derivative of one projected gradient step at its codes, in place of the implicit one."""
    model = network(found, setting, seed, factors=True)
    place = nmf_layer(model, OneStepNMF, setting, seed)
    encoder, head = model[: place + 1], model[place + 1 :]
    trained(found, setting, seed, encoder, head, setting.decoder, reconstruction=setting.reconstruction)
    model[place].update_dictionary()
    return of_network(found, setting, model.eval(), [])


class OneStepNMF(NMF):
    """Geng et al., "Is attention better than matrix decomposition?", arXiv:2109.04553, for exact codes."""

    def forward(self, a: Tensor) -> Tensor:
        with torch.no_grad():
            codes: Tensor = super().forward(a)
        if not a.requires_grad:
            return codes
        gram = self.dictionary.T @ self.dictionary
        gram.diagonal().add_(self.ridge)
        step = 1 / torch.linalg.matrix_norm(gram, 2)
        self.input = a
        return (codes - step * (codes @ gram - a @ self.dictionary.clone())).clamp_min(0)


# -- DeepFacto ---------------------------------------------------------------------------------------------------------


class FixedNMF(NMF):
    """An NMF layer whose dictionary stays a random one."""

    def initialise(self, a: Tensor) -> None:
        self.dictionary.copy_(
            nn.functional.normalize(torch.rand(self.dictionary.shape, generator=stream(self.seed, 5)), dim=0)
        )
        self.initialised.fill_(True)

    def absorb(self, sums: Any) -> None:
        pass


def deepfacto(
    *, permuted: bool = False, fixed: bool = False, **settings: Any
) -> Callable[[AttributeSet, Setting, int], Coded]:
    """permuted: train on shuffled labels; fixed: on a random dictionary, at a fortieth of the reconstruction's weight:
    at the whole of it all features become 0."""

    def row(found: AttributeSet, setting: Setting, seed: int) -> Coded:
        model = network(found, setting, seed, factors=True)
        nmf_layer(model, FixedNMF if fixed else NMF, setting, seed)
        recipe = DeepFacto(
            **{
                "decoder": setting.decoder,
                "reconstruction": setting.reconstruction / (40 if fixed else 1),
                "lr": setting.lr,
                "label_smoothing": setting.label_smoothing,
                "schedule": "cosine",
                "schedule_steps": num_steps(found, setting),
                "seed": seed,
                **settings,
            }
        )
        training = recipe.bind(model, losses.Softmax())
        labels = found.train.label
        if permuted:
            labels = labels[torch.randperm(len(labels), generator=stream(seed, 6)).numpy()]
        gaps = []
        for x, y in batches(found, setting, seed, labels):
            gaps.append(training.step(Batch(x, y)).get("code_gap"))
        training.sync()
        return of_network(found, setting, model.eval(), gaps[-(len(found.train) // setting.batch_size) :])

    return row


def of_network(found: AttributeSet, setting: Setting, model: nn.Module, gaps: list[Any]) -> Coded:
    taken = piecework.factors.parts(model)
    codes, errors, said = {}, {}, {}
    with torch.no_grad():
        for name, x in parts_of(found, setting).items():
            a = taken.encoder(x)
            s = taken.nmf(a)
            codes[name], said[name] = s.numpy(), taken.head(s).argmax(1).numpy()
            errors[name] = d.relative_error(a, taken.nmf.reconstruct(s)) if a.any() else float("nan")
    known = [float(gap) for gap in gaps if gap is not None]
    return Coded(codes, errors, said, float(np.mean(known)) if known else None, taken.nmf.dictionary.numpy().copy())
