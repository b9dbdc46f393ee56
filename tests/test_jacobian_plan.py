"""Plans and captures: what they leave alone, what they notice, and which models they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jacobian_cases import CASES, Twice, dense, filled, randn, relative
from piecework.methods.gauss_newton.jacobian.capture import capture, values_of
from piecework.methods.gauss_newton.jacobian.factors import Lookup
from piecework.methods.gauss_newton.jacobian.planning import plan
from piecework.training import BadInput, CannotTrain, stream

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),  # forward mode loads
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]


# -- captures ----------------------------------------------------------------------------------------------------------


def test_a_capture_leaves_nothing_behind() -> None:
    model = filled(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)))
    model[1].eval()  # type: ignore[index, operator]
    x, before = randn(5, 5, seed=1), torch.get_rng_state()
    capture(model, plan(model, x), x)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model] == [True, False, True]  # type: ignore[attr-defined]
    assert not x.requires_grad


def test_a_plan_restores_buffers() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += len(x)
            return self.layer(x)  # type: ignore[no-any-return]

    model = filled(Counter())
    plan(model, randn(5, 5))
    assert float(model.get_buffer("seen")) == 0


def test_a_hook_that_changes_a_layers_output_is_seen() -> None:
    model = filled(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3)))
    model[0].register_forward_hook(lambda module, args, output: torch.tanh(output))  # type: ignore[index]
    x = randn(5, 5, seed=1)
    layout = plan(model, x)
    assert not layout.rows
    assert relative(capture(model, layout, x)[1].rows(0, 15), dense(model, x).flatten(0, 1)) < 1e-12


def test_a_layer_that_a_batch_does_not_use_has_no_derivative() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.table = nn.Linear(5, 3), nn.Linear(5, 3), nn.Embedding(2, 3)
            self.both = True

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.first(x)
            return z + self.second(x) + self.table(x[:, 0].gt(0).long()) if self.both else z

    model, x = filled(Optional()), randn(5, 5, seed=1)
    assert isinstance(model, Optional)
    layout = plan(model, x)
    model.both = False
    _, jacobian = capture(model, layout, x)
    right = dense(model, x).flatten(0, 1)
    assert relative(jacobian.gram(), right @ right.t()) < 1e-12


def test_a_models_own_use_of_its_input_stays_its_own() -> None:
    class Marks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.requires_grad_()

    model, x = filled(nn.Sequential(Marks(), nn.Linear(5, 3))), randn(5, 5, seed=1)
    capture(model, plan(model, x), x)
    assert not x.requires_grad


def test_the_reason_for_rows_is_told() -> None:
    reasons = {
        "laplacian by torch.func": "inside a transform",
        "laplacian by autograd": "calls do not explain",
        "bare parameters": "not called as a module",
        "tied table": "no known factors",
        "positions in front": "no samples in front",
    }
    for name, reason in reasons.items():
        case = CASES[name]
        assert any(reason in told for told in plan(filled(case.make()), case.x).reasons.values()), name


def test_an_idle_parameter_is_named() -> None:
    case = CASES["laplacian by torch.func"]
    assert plan(filled(case.make()), case.x).idle == ("net.4.bias",)
    assert plan(filled(Twice()), randn(5, 5)).idle == ()


def test_outputs_without_a_graph_are_those_with_one() -> None:
    for name, derives in [("laplacian by autograd", True), ("laplacian by torch.func", False), ("mlp", False)]:
        case = CASES[name]
        model = filled(case.make())
        layout = plan(model, case.x)
        assert layout.derives == derives
        z = values_of(model, layout, case.x)
        assert not z.requires_grad
        torch.testing.assert_close(z.reshape(-1), model(case.x).detach().reshape(-1), rtol=1e-14, atol=1e-14)


def test_seeds_of_another_shape_are_refused() -> None:
    model, x = filled(nn.Linear(5, 3)), randn(5, 5, seed=1)
    layout = plan(model, x)
    with pytest.raises(BadInput, match="outputs' shape"):
        capture(model, layout, x, lambda z: [z[:, 0]])
    with pytest.raises(BadInput, match="at least one sample"):
        capture(model, layout, x[:0])
    with pytest.raises(BadInput, match="at least one row"):
        plan(model, x[:0])


# -- refusals ----------------------------------------------------------------------------------------------------------


class _Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class _First(nn.Module):
    """Adds the row in front of it to a row."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.cat([torch.zeros_like(x[:1]), x[:-1]])


class _Next(nn.Module):
    """Adds the row behind it to a row."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.cat([x[1:], torch.zeros_like(x[:1])])


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (nn.Dropout(0.3), r"two forward passes differ \(layer 1\)"),
        (nn.BatchNorm1d(5), r"depends on its batch \(layer 1\)"),
        (nn.BatchNorm1d(5, track_running_stats=False).eval(), r"depends on its batch \(layer 1\)"),
        (_Centred(), "depends on its batch"),
        (_Next(), "depends on its batch"),
        (_First(), "depends on its batch"),
        (nn.Flatten(0), "one row of outputs for each sample"),
    ],
)
def test_models_without_rows_of_their_own_are_refused(layer: nn.Module, match: str) -> None:
    model = filled(nn.Sequential(nn.Linear(5, 5), layer))
    before = torch.get_rng_state()
    with pytest.raises(CannotTrain, match=match):
        plan(model, randn(5, 5, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_models_without_a_derivative_are_refused() -> None:
    class Detached(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    with pytest.raises(CannotTrain, match="no derivative"):
        plan(filled(Detached(5, 3)), randn(5, 5))
    model = nn.Sequential(nn.Linear(5, 3).double(), nn.Linear(3, 3))
    with pytest.raises(CannotTrain, match="float32 on cpu, torch"):
        plan(model, randn(5, 5))


def test_a_stale_plan_is_refused() -> None:
    class Fold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.fold = nn.Linear(5, 3), 1

        def forward(self, x: Tensor) -> Tensor:
            padded = torch.cat([x, x[:1]]) if self.fold == 2 else x
            z: Tensor = self.layer(padded)
            return z[: len(x)]

    model, x = filled(Fold()), randn(5, 5, seed=1)
    layout = plan(model, x)
    model.fold = 2
    with pytest.raises(CannotTrain, match="not a whole number of rows"):
        capture(model, layout, x)


def test_an_embeddings_options_that_alter_the_gradient_take_rows_or_padding() -> None:
    x = torch.tensor([[1, 2], [0, 0], [2, 2]])
    model = filled(nn.Sequential(nn.Embedding(3, 5, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(10, 3)))
    with pytest.raises(CannotTrain, match="sample by sample"):
        plan(model, x)
    block = Lookup(x, randn(3, 1, 2, 5), 3)
    assert block.rows(1, 2).reshape(3, 5)[1:].abs().sum() == 0
    assert stream(0).initial_seed() != stream(1).initial_seed()


def test_values_that_are_not_finite_are_a_sentence() -> None:
    with pytest.raises(CannotTrain, match="not finite"):
        plan(filled(nn.Linear(5, 3)), randn(5, 5) / 0)


def test_a_derivative_that_cancels_keeps_its_factors() -> None:
    model = filled(nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 3)))
    shift = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 5, bias=False)).double()
    with torch.no_grad():
        shift[1].weight.fill_(1)

    class Shifted(nn.Module):
        """Adds a constant to all features, which the norm takes away: its derivative is rounding."""

        def __init__(self) -> None:
            super().__init__()
            self.shift, self.net = shift, model

        def forward(self, x: Tensor) -> Tensor:
            return self.net[1:](self.net[0](x) + self.shift(x[:, :1]))  # type: ignore[no-any-return, index, operator]

    assert not plan(Shifted(), randn(5, 5, seed=1)).rows
