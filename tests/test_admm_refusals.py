"""What ADMM cannot train it refuses when it is bound, with the name of the layer and the way out."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chains import SQUARED, bind, chain, curved
from piecework import losses
from piecework.losses import Loss
from piecework.methods import ADMM
from piecework.nn import Standardise
from piecework.training import BadInput, CannotTrain

OTHERS = "use sgd, adam or lbfgs"


def _shared() -> nn.Module:
    layer = nn.Linear(5, 5)
    return nn.Sequential(OrderedDict(one=layer, act=nn.ReLU(), two=layer, last=nn.Linear(5, 2)))


def _tied() -> nn.Module:
    model = nn.Sequential(OrderedDict(one=nn.Linear(5, 5), act=nn.ReLU(), two=nn.Linear(5, 5), last=nn.Linear(5, 2)))
    model.two.weight = model.one.weight
    return model


def _frozen() -> nn.Module:
    model = nn.Sequential(OrderedDict(one=nn.Linear(5, 7), act=nn.ReLU(), last=nn.Linear(7, 2)))
    model.one.weight.requires_grad_(False)
    return model


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class _Skipping(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class _Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _Louder(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _around(name: str, layer: nn.Module) -> Callable[[], nn.Module]:
    layers = {"one": nn.Linear(5, 7), name: layer, "act": nn.ReLU(), "last": nn.Linear(7, 2)}
    return lambda: nn.Sequential(OrderedDict(layers))


# what: (model, name of the layer, part of the way out)
MODELS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "convolution first": (
        lambda: nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 3), flat=nn.Flatten(), last=nn.Linear(8, 2))),
        "conv",
        OTHERS,
    ),
    "convolution inside": (_around("conv", nn.Conv1d(7, 7, 1)), "conv", OTHERS),
    "batch normalisation": (_around("norm", nn.BatchNorm1d(7)), "norm", OTHERS),
    "batch normalisation first": (
        lambda: nn.Sequential(OrderedDict(norm=nn.BatchNorm1d(5), last=nn.Linear(5, 2))),
        "norm",
        OTHERS,
    ),
    "layer normalisation": (_around("norm", nn.LayerNorm(7)), "norm", OTHERS),
    "dropout": (_around("drop", nn.Dropout(0.5)), "drop", OTHERS),
    "gelu": (_around("gelu", nn.GELU()), "gelu", OTHERS),
    "prelu": (_around("prelu", nn.PReLU()), "prelu", OTHERS),
    "a subclass of relu": (_around("louder", _Louder()), "louder", OTHERS),
    "two activations": (_around("tanh", nn.Tanh()), "act", OTHERS),
    "final softmax": (
        lambda: nn.Sequential(OrderedDict(one=nn.Linear(5, 2), probabilities=nn.Softmax(1))),
        "probabilities",
        "",
    ),
    "final sigmoid": (
        lambda: nn.Sequential(OrderedDict(one=nn.Linear(5, 1), probability=nn.Sigmoid())),
        "probability",
        "leave it out",
    ),
    "an activation first": (
        lambda: nn.Sequential(OrderedDict(act=nn.ReLU(), last=nn.Linear(5, 2))),
        "act",
        OTHERS,
    ),
    "the same layer twice": (_shared, "two", "untie them"),
    "a shared weight": (_tied, "two", "untie them"),
    "a frozen layer": (_frozen, "one", "requires_grad_(True)"),
    "half precision": (lambda: _around("act0", nn.Identity())().half(), "one", "model.float()"),
    "bfloat16": (lambda: _around("act0", nn.Identity())().bfloat16(), "one", "model.float()"),
    "a residual": (
        lambda: nn.Sequential(OrderedDict(res=_Residual(), last=nn.Linear(5, 2))),
        "res",
        OTHERS,
    ),
    "a sequence with a way around it": (_around("skip", _Skipping(nn.ReLU(), nn.Linear(7, 7))), "skip", OTHERS),
    "a subclass of linear": (
        lambda: nn.Sequential(OrderedDict(one=_Scaled(5, 7), act=nn.ReLU(), last=nn.Linear(7, 2))),
        "one",
        OTHERS,
    ),
    "widths that do not meet": (
        lambda: nn.Sequential(OrderedDict(one=nn.Linear(5, 7), act=nn.ReLU(), last=nn.Linear(6, 2))),
        "last",
        "takes 6 features",
    ),
    "nested": (
        lambda: nn.Sequential(OrderedDict(body=_around("drop", nn.Dropout())(), act=nn.ReLU(), last=nn.Linear(2, 2))),
        "body.drop",
        OTHERS,
    ),
}


@pytest.mark.parametrize("mode", ["resynchronised", "taylor2016"])
@pytest.mark.parametrize("what", MODELS)
def test_the_refusal_names_the_layer_and_the_way_out(what: str, mode: str) -> None:
    make, name, way = MODELS[what]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
    with pytest.raises(CannotTrain, match=re.escape(repr(name))) as refusal:
        bind(model, mode=mode)
    assert way in str(refusal.value)


def test_a_model_without_a_linear_layer_is_refused() -> None:
    with pytest.raises(CannotTrain, match=r"no nn\.Linear layer; ADMM trains nn\.Sequential chains"):
        bind(nn.Sequential(nn.Flatten(), nn.ReLU()))


class _OnlyAValue:
    """A user's loss that has a value and nothing more."""

    name = "cauchy"

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.log1p((z - y).square()).mean()


class _WithoutProx(losses.Squared):
    prox = property()  # type: ignore[assignment]


@pytest.mark.parametrize("mode", ["resynchronised", "taylor2016"])
@pytest.mark.parametrize("loss", [_OnlyAValue(), _WithoutProx()])
def test_a_loss_without_a_proximal_map_is_refused(loss: Loss, mode: str) -> None:
    with pytest.raises(CannotTrain, match=r"lacks .*prox") as refusal:
        bind(chain(5, 7, 2), loss, mode=mode)
    assert "use squared, hinge, logistic or softmax" in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"ridge": -1.0}, "ridge"),
        ({"ridge": float("nan")}, "ridge"),
        ({"output_ridge": -0.1}, "output_ridge"),
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": -1.0}, "gamma"),
        ({"beta": 0.0}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"max_trials": 0}, "max_trials"),
        ({"tile": 0}, "tile"),
        ({"warm_sweeps": -1}, "warm_sweeps"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(BadInput, match=name):
        ADMM(**settings)


def test_gamma_below_beta_warns() -> None:
    for settings in ({"gamma": 0.5}, {"beta": 2.0}, {"gamma": 1.0, "beta": 10.0}):
        with pytest.warns(UserWarning, match="badly with gamma"):
            ADMM(**settings)


def test_the_published_penalties_do_not_warn() -> None:
    assert ADMM(mode="taylor2016").gamma is None
    # the paper's gamma is 10, so a beta of 2 is well below it
    ADMM(mode="taylor2016", beta=2.0)
    with pytest.warns(UserWarning, match=r"gamma \(10\) below beta \(20\)"):
        ADMM(mode="taylor2016", beta=20.0)
    ADMM(gamma=10.0, beta=1.0)
    ADMM(gamma=2.0, beta=2.0)


def test_a_refused_model_is_left_as_it_was() -> None:
    model = nn.Sequential(*chain(5, 7, 2), nn.Dropout())
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(CannotTrain):
        bind(model)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_what_stands_before_the_first_linear_layer_may_scale_and_flatten() -> None:
    mean, scale = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    for layers in (
        [nn.Flatten()],
        [nn.Identity()],
        [Standardise(mean, scale)],
        [nn.Flatten(), Standardise(mean, scale)],
    ):
        bind(nn.Sequential(*layers, chain(5, 7, 2))).step(curved())


def test_a_single_linear_layer_needs_no_sequential() -> None:
    model = nn.Linear(5, 2, dtype=torch.float64)
    assert float(bind(model, SQUARED).step(curved())["loss"]) < 2
