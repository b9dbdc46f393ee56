"""The heads of Local, its exits, and what it refuses."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from local_cases import LOSS, network, rows, same
from piecework import BadInput, Batch, CannotTrain, Classifier, Local, losses
from piecework.group import Group, Solo
from piecework.methods.local.reconstruct import TEMPERATURE, Contrast, Reconstructing
from piecework.models import mlp
from piecework.nn import EarlyExit, Sign
from piecework.testing import threads

KINDS: list[Any] = ["linear", "mlp", "infopro"]


def _pictures(n: int = 6, *, flat: bool = False) -> tuple[nn.Sequential, Batch]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 1, 8, 8, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 6, 3, stride=2, padding=1), nn.ReLU()]
        model = nn.Sequential(*([nn.Unflatten(1, (1, 8, 8))] if flat else []), *layers, nn.Flatten(), nn.Linear(96, 3))
    return model, Batch(x.flatten(1) if flat else x, torch.arange(n) % 3)


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.embedding(x).cumsum(1)
        return h


def _sequence() -> tuple[nn.Sequential, Batch]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(_Tokens(), nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 11, bias=False))
    x = torch.arange(24).reshape(4, 6) % 11
    return model, Batch(x, (x + 1) % 11)


def _head(model: nn.Module, batch: Batch, **more: Any) -> Any:
    training = Local(probe_every=0, **more).bind(model, LOSS)
    training.step(batch)
    assert training.stages[0].head is not None
    return training.stages[0].head.module


def test_the_shape_decides_the_head() -> None:
    model, batch = _pictures()
    assert isinstance(_head(model, batch, at=(2,))[0], nn.Conv2d)
    model, batch = _sequence()
    head = _head(model, batch, at=(1,))
    assert [type(one) for one in head] == [nn.LayerNorm, nn.Linear]
    assert [type(one) for one in _head(network(depth=2), rows())] == [nn.Linear]


def test_an_unembedding_starts_as_a_copy_of_the_models_own() -> None:
    model, batch = _sequence()
    last = model[3].weight.detach().clone()
    head = _head(model, batch, at=(1,), optimizer=partial(torch.optim.SGD, lr=0.0))
    assert torch.equal(head[1].weight, last)
    assert head[1].weight is not model[3].weight


@pytest.mark.parametrize("kind", ["linear", "mlp", "conv", "infopro", "contrastive"])
@pytest.mark.parametrize("flat", [False, True], ids=["pictures", "flat"])
def test_every_head_learns_from_pictures(kind: Any, flat: bool) -> None:
    model, batch = _pictures(flat=flat)
    training = Local(heads=kind, head_width=8, lr=0.01, at=(2 + flat,), probe_every=0).bind(model, LOSS)
    told = [float(training.step(batch)["local_loss_0"]) for _ in range(30)]
    assert told[-1] < 0.8 * told[0]


def test_the_reconstruction_is_a_squared_error_in_units_of_the_rows() -> None:
    batch = rows()
    head = Reconstructing(nn.Linear(7, 3), nn.Linear(7, 5), 0.5, 2.0).double()
    h = torch.randn(24, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = (batch.x - batch.x.mean(0)) / (batch.x.std(0, correction=0) + 1e-6 * (1 + batch.x.mean(0).abs()))
    wanted = 2.0 * LOSS(head.classifier(h), batch.y) + 0.5 * (head.decoder(h) - target).square().mean()
    assert torch.allclose(head.charge(h, batch, LOSS), wanted, rtol=1e-12)
    larger = Batch(1000 * batch.x + 7, batch.y)
    assert torch.allclose(head.charge(h, larger, LOSS), wanted, rtol=1e-5)


def test_the_contrast_is_the_double_loop_over_rows_of_a_class() -> None:
    batch = rows(9)
    head = Contrast(nn.Linear(7, 4), nn.Linear(7, 5), 0.0, 1.0).double()
    h = torch.randn(9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = F.normalize(head.classifier(h), dim=1)
    terms = []
    for i in range(9):
        alike = [j for j in range(9) if j != i and batch.y[j] == batch.y[i]]
        below = torch.stack([(z[i] @ z[a] / TEMPERATURE).exp() for a in range(9) if a != i]).sum()
        if alike:
            terms.append(-torch.stack([((z[i] @ z[j] / TEMPERATURE).exp() / below).log() for j in alike]).mean())
    assert torch.allclose(head.charge(h, batch, LOSS), torch.stack(terms).mean(), rtol=1e-10)


def test_a_row_alone_has_nothing_to_be_told_from() -> None:
    training = Local(heads="contrastive", probe_every=0).bind(network(depth=2), LOSS)
    training.step(rows(1))
    assert all(bool(one.isfinite().all()) for one in training.model.parameters())


def test_a_head_of_ones_own_is_made_from_a_row_and_the_number_of_outputs() -> None:
    seen = []

    def make(h: Tensor, num_outputs: int) -> nn.Module:
        seen.append((tuple(h.shape), num_outputs))
        return nn.Sequential(nn.Dropout(0.5), nn.Linear(h.shape[1], num_outputs))

    found = []
    for seed in (0, 1):
        model = network(depth=3)
        training = Local(blocks=3, make_head=make, seed=4).bind(model, LOSS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for _ in range(3):
                training.step(rows())
        found.append(list(model.parameters()))
    assert seen[:2] == [((1, 7), 3), ((1, 7), 3)]
    assert same(*found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2])
def test_exits_are_the_blocks_and_their_heads_on_every_rank(kind: Any, size: int) -> None:
    def work(group: Group) -> list[Tensor]:
        training = Local(blocks=3, heads=kind, head_width=4, lr=0.02).bind(network(depth=3), LOSS, group=group)
        for seed in range(4):
            training.step(rows(seed=seed))
        exits = training.exits()
        assert torch.equal(exits[-1](rows().x), training.model(rows().x))
        before = [one(rows().x).detach() for one in exits]
        for stage in training.stages:
            if stage.head is not None and stage.number == 0:
                wanted = stage.head.module(stage.block.module(rows().x))
                assert torch.equal(before[0], wanted)
        training.step(rows())
        training.sync()
        assert same([one(rows().x) for one in exits], before)  # copies, which do not follow the training
        assert exits[0][0][0] is exits[2][0][0]
        return before

    alone, *others = threads(size, work)
    assert all(same(alone, one) for one in others)
    assert same(alone, work(Solo()))


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_row_leaves_at_the_first_exit_that_is_sure_of_it(outputs: int) -> None:
    exits = []
    blocks = [nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3)]
    for number in range(3):
        exits.append(nn.Sequential(nn.Sequential(*blocks[: number + 1]), nn.Linear(5, outputs)))
    x = 3 * rows(40).x.float()
    for threshold in (0.0, 0.5, 0.6, 1.1):
        z, taken = EarlyExit(exits, threshold).route(x)
        for row in range(40):
            each = [one(x[row : row + 1])[0].detach() for one in exits]
            sure = [
                float(torch.sigmoid(one.abs()) if outputs == 1 else torch.softmax(one, 0).max()) >= threshold
                for one in each
            ]
            wanted = next((number for number in range(2) if sure[number]), 2)
            assert int(taken[row]) == wanted
            assert torch.allclose(z[row], each[wanted], atol=1e-6)
    assert torch.equal(EarlyExit(exits, 0.0)(x), EarlyExit(exits, 0.0).route(x)[0])


def test_exits_that_there_are_not_are_refused() -> None:
    training = Local(blocks=3, coupling="interlock", probe_every=0).bind(network(depth=3), LOSS)
    with pytest.raises(BadInput, match="no exits before the first step"):
        training.exits()
    training.step(rows())
    with pytest.raises(BadInput, match=r"head of block 0 rests.*every_head=True"):
        training.exits()
    contrast = Local(heads="contrastive").bind(network(depth=2), LOSS)
    contrast.step(rows())
    with pytest.raises(BadInput, match="gives no outputs"):
        contrast.exits()
    with pytest.raises(ValueError, match="exit 0 must be"):
        EarlyExit([nn.Linear(5, 3)])
    with pytest.raises(ValueError, match="given none"):
        EarlyExit([])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"coupling": "loose"}, "coupling must be greedy, overlap, chunk or interlock"),
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"reach": 0}, "reach must be at least 1"),
        ({"staleness": -1}, "staleness must be at least 0"),
        ({"heads": "large"}, "heads must be auto, linear"),
        ({"head_width": 0}, "head_width must be at least 1"),
        ({"reconstruct": (-1.0, 0.0)}, "reconstruct must be at least 0"),
        ({"supervise": (0.0, 1.0)}, "supervise must be above 0"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"buffers": 0}, "buffers must be at least 1"),
        ({"probe_every": -1}, "probe_every must be at least 0"),
        ({"at": (1,), "blocks": 2}, "either at=.* or blocks="),
        ({"anneal": (5, 5)}, "two rising steps"),
        ({"schedule": "cosine"}, "needs schedule_steps"),
    ],
)
def test_settings_that_make_no_method_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        Local(**settings)


def test_settings_that_do_nothing_are_said_to() -> None:
    with pytest.warns(UserWarning, match="lr is Adam's"):
        Local(lr=0.1, optimizer=partial(torch.optim.SGD, lr=0.1))
    with pytest.warns(UserWarning, match="does nothing beside make_head"):
        Local(heads="mlp", make_head=lambda h, num_outputs: nn.Linear(h.shape[1], num_outputs))


class _Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.second(self.first(x))
        return h


def _tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3))
    model[2].weight = model[0].weight
    return model


def _frozen_end() -> nn.Sequential:
    model = network(depth=2)
    model[2].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "recipe", "said"),
    [
        (_Inner, Local(), "cuts an nn.Sequential, and this model is one _Inner"),
        (partial(mlp, 5, [7], 3), Local(at=(3,)), "rising positions from 1 to 2"),
        (partial(mlp, 5, [7], 3), Local(blocks=3), "cut into 1 to 2 blocks"),
        (_tied, Local(at=(2,)), "share a parameter .* tied layers stay together"),
        (partial(mlp, 5, [7], 3, activation="sign"), Local(), "needs a derivative"),
        (lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)), Local(at=(1,)), "in place"),
        (_frozen_end, Local(), "no block would learn from the loss of the model itself"),
        (nn.Flatten, Local(), "nothing to train"),
    ],
)
def test_models_that_cannot_be_trained_like_this_are_refused(model: Any, recipe: Local, said: str) -> None:
    with pytest.raises(CannotTrain, match=said):
        recipe.bind(model(), LOSS)


def test_more_ranks_than_blocks_are_refused() -> None:
    outcomes = threads(3, lambda group: Local().bind(network(depth=6), LOSS, group=group), outcomes=True)
    assert all(isinstance(one, CannotTrain) and "2 for 3 ranks; use at most 2" in str(one) for one in outcomes)


class _Pair(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x, x


class _Blind(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).double()


def test_what_only_rows_tell_is_refused_at_the_first_step() -> None:
    def first(model: nn.Module, batch: Batch, loss: losses.Loss = LOSS, **more: Any) -> None:
        Local(probe_every=0, **more).bind(model, loss).step(batch)

    plain = network(depth=2)
    with pytest.raises(CannotTrain, match=r"block 0 .*_Pair.* gives a tuple"):
        first(nn.Sequential(plain[0], _Pair(), plain[2]), rows(), at=(2,))
    with pytest.raises(CannotTrain, match=r"no derivative .* block 0"):
        first(nn.Sequential(plain[0], _Blind(), plain[2]), rows(), at=(2,))
    with pytest.raises(CannotTrain, match="kind conv takes pictures"):
        first(network(depth=2), rows(), heads="conv")
    with pytest.raises(CannotTrain, match="kind unembedding takes sequences"):
        first(network(depth=2), rows(), heads="unembedding")
    model, batch = _sequence()
    with pytest.raises(CannotTrain, match="not real numbers"):
        first(model, batch, heads="infopro", at=(1,))
    with pytest.raises(CannotTrain, match="these targets are numbers"):
        first(network(depth=2), Batch(rows().x, rows().x[:, :3]), losses.Squared(), heads="contrastive")
    with pytest.raises(CannotTrain, match="make_head must give a torch"):
        first(network(depth=2), rows(), make_head=lambda h, num_outputs: None)
    with pytest.raises(BadInput, match="has no rows"):
        first(network(depth=2), rows(0))


def test_layers_without_a_derivative_may_stand_in_the_network_if_nothing_before_them_learns() -> None:
    model = nn.Sequential(nn.Linear(5, 7), Sign(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    model[0].requires_grad_(False)
    Local(blocks=2, coupling="overlap").bind(model, LOSS).step(rows())


def test_a_state_of_other_blocks_is_refused() -> None:
    three, two = (Local(blocks=number).bind(network(), LOSS) for number in (3, 2))
    three.step(rows())
    with pytest.raises(BadInput, match="the state is of 3 blocks"):
        two.load_state_dict(three.state_dict())


def test_an_estimator_takes_it() -> None:
    found = Classifier(method=Local(lr=0.01, blocks=2), hidden=(9,), epochs=30, batch_size=24)
    batch = rows(96)
    y = (batch.x[:, 0] > 0).long()
    assert found.fit(batch.x.numpy(), y.numpy()).score(batch.x.numpy(), y.numpy()) > 0.9
