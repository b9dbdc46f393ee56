"""DeepFacto's four ways through the NMF layer, against each other, against autograd and against their limits."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from torch import Tensor, nn

from kept import Kept
from piecework import Batch, BlockADMM, CannotTrain, DeepFacto, FactorClassifier, factors, losses
from piecework.group import Group
from piecework.methods.deepfacto.at_work import FactorsAtWork
from piecework.methods.deepfacto.codes import Pull, informed
from piecework.models import mlp
from piecework.nn import NMF
from piecework.nn.nmf import as_rows
from piecework.solvers.nnls import composite_nnls, nnls
from piecework.testing import threads
from piecework.training import BadInput

LOSS = losses.Softmax()


def _network(seed: int = 0, *, hidden: tuple[int, ...] = (24,), rank: int = 3) -> nn.Sequential:
    return mlp(5, hidden, 3, factors=rank, seed=seed, dtype=torch.float64)


def _rows(n: int = 24, *, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return Batch(x, torch.randint(3, (n,), generator=generator), torch.arange(n))


def _stepped(recipe: DeepFacto, model: nn.Sequential, batch: Batch) -> FactorsAtWork:
    """One step of a model whose dictionary has seen the batch before."""
    found = factors.parts(model)
    with torch.no_grad():
        found.nmf.initialise(found.encoder(batch.x))
    training = recipe.bind(model, LOSS)
    assert isinstance(training, FactorsAtWork)
    training.step(batch)
    return training


def _given(training: FactorsAtWork, part: str) -> list[Tensor]:
    block = {"encoder": training._encoder, "head": training._head, "decoder": training._decoding}[part]
    assert block is not None
    assert isinstance(block.optimizer, Kept)
    return [sum(columns) for columns in zip(*block.optimizer.given, strict=True)]


def _apart(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """The relative difference of two lists of tensors."""
    one, other = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (found, wanted))
    return float((one - other).norm() / other.norm())


def test_implicit_is_the_derivative_of_the_whole_loss() -> None:
    model, batch = _network(), _rows()
    training = _stepped(DeepFacto(through="implicit", reconstruction=0.7, decoder=0.0, optimizer=Kept), model, batch)
    twin = _network()
    found = factors.parts(twin)
    with torch.no_grad():
        found.nmf.initialise(found.encoder(batch.x))
    found.nmf.track = False
    a = found.encoder(batch.x)
    codes = found.nmf(a)
    missing = (a - codes.detach() @ found.nmf.dictionary.T).square().sum()
    total = LOSS(found.head(codes), batch.y) + 0.35 * missing / len(batch)
    parameters = [*found.encoder.parameters(), *found.head.parameters()]
    wanted = torch.autograd.grad(total, parameters)
    assert _apart([*_given(training, "encoder"), *_given(training, "head")], wanted) < 1e-12


@pytest.mark.parametrize(
    ("two_sided", "couplings", "factor"), [(False, (1e4, 1e5, 1e6), 10.0), (True, (4e3, 8e3, 1.6e4), 4.0)]
)
def test_contrast_tends_to_the_implicit_derivative(
    two_sided: bool, couplings: tuple[float, ...], factor: float
) -> None:
    """From where the active set no longer changes."""
    batch = _rows(3)
    settings: dict[str, Any] = {"reconstruction": 0.3, "decoder": 0.0, "optimizer": Kept}
    wanted = _given(_stepped(DeepFacto(through="implicit", **settings), _network(), batch), "encoder")
    errors = []
    for coupling in couplings:
        recipe = DeepFacto(through="contrast", coupling=coupling, two_sided=two_sided, code_steps=3000, **settings)
        errors.append(_apart(_given(_stepped(recipe, _network(), batch), "encoder"), wanted))
    for before, after in pairwise(errors):
        assert 0.8 * factor < before / after < 1.25 * factor, errors


def test_sweeps_converge_to_the_envelope() -> None:
    batch = _rows()
    settings: dict[str, Any] = {"coupling": 2.0, "decoder": 0.5}

    class _Last(Kept):
        """The last direction alone; the weights stand still."""

        def step(self, closure: object = None) -> None:  # type: ignore[override]
            self.given = [[one.grad.clone() for one in self.param_groups[0]["params"]]]

    envelope = DeepFacto(through="envelope", code_steps=400, optimizer=Kept, **settings)
    wanted = _given(_stepped(envelope, _network(), batch), "encoder")
    recipe = DeepFacto(through="block-admm", sweeps=150, code_steps=40, optimizer=_Last, **settings)
    assert _apart(_given(_stepped(recipe, _network(), batch), "encoder"), wanted) < 1e-6


def test_informed_codes_are_those_of_the_composite_problem() -> None:
    model, batch = _network(), _rows()
    found = factors.parts(model)
    with torch.no_grad():
        a = found.encoder(batch.x)
        found.nmf.initialise(a)
    decoder = nn.Linear(3, 5, dtype=torch.float64)
    free = nnls(a, found.nmf.dictionary, ridge=1e-3).x
    pull = Pull(found.head, LOSS, batch.y, decoder, 0.4, batch.x, free)
    mine = informed(pull, a, found.nmf.dictionary, weight=2.0, ridge=1e-3, start=free, steps=3000)
    wanted = composite_nnls(pull.slope, pull.lipschitz(), a, found.nmf.dictionary, weight=2.0, ridge=1e-3).x
    assert float((mine - wanted).abs().max()) < 1e-8


@pytest.mark.parametrize(
    ("head", "shape"),
    [
        (nn.Linear(3, 4), (6, 3)),
        (nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 4)), (6, 3)),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), (6, 3, 2, 2)),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 4)), (6, 3, 2, 2)),
    ],
    ids=["layer", "layers", "flat layer", "flat layers"],
)
def test_the_pull_on_codes_is_the_slope_of_what_it_stands_for(head: nn.Module, shape: tuple[int, ...]) -> None:
    head = head.double()
    generator = torch.Generator().manual_seed(2)
    like, other = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x, y = torch.randn(6, 5, generator=generator, dtype=torch.float64), torch.randint(4, (6,), generator=generator)
    decoder = nn.Linear(like[0].numel(), 5, dtype=torch.float64)
    pull = Pull(head, LOSS, y, decoder, 0.4, x, like)
    codes = other.requires_grad_()
    value = LOSS.total(head(codes), y) + 0.4 * (decoder(codes.flatten(1)) - x).square().sum()
    (wanted,) = torch.autograd.grad(value, codes)
    assert float((pull.slope(as_rows(other.detach())) - as_rows(wanted)).abs().max()) < 1e-12


def test_the_bound_of_the_curvature_holds() -> None:
    head = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    decoder, batch = nn.Linear(3, 5, dtype=torch.float64), _rows(7)
    pull = Pull(head, LOSS, batch.y, decoder, 0.4, batch.x, torch.zeros(7, 3, dtype=torch.float64))
    bound = float(pull.lipschitz())
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        s = 2 * torch.rand(7, 3, generator=generator, dtype=torch.float64)
        step = 1e-4 * torch.randn(7, 3, generator=generator, dtype=torch.float64)
        change = (pull.slope(s + step) - pull.slope(s)).norm(dim=1) / step.norm(dim=1)
        assert float(change.median()) < bound  # a kink of the ReLU may lie within a single step


@pytest.mark.parametrize("through", ["block-admm", "envelope", "contrast", "implicit"])
def test_the_head_and_the_decoder_learn_from_codes_without_a_label(through: str) -> None:
    model, batch = _network(), _rows()
    training = _stepped(DeepFacto(through=through, decoder=0.8, optimizer=Kept), model, batch)  # type: ignore[arg-type]
    twin = _network()
    found = factors.parts(twin)
    decoder = nn.Linear(3, 5, dtype=torch.float64)
    assert training._decoder is not None
    decoder.load_state_dict(training._decoder.state_dict())
    with torch.no_grad():
        a = found.encoder(batch.x)
        found.nmf.initialise(a)
        codes = nnls(a, found.nmf.dictionary, ridge=1e-3).x
    variance = (batch.x - batch.x.mean(0)).square().sum() / len(batch)
    missing = (decoder(codes) - batch.x).square().sum() / len(batch)
    total = LOSS(found.head(codes), batch.y) + 0.8 / variance * missing
    wanted = torch.autograd.grad(total, [*found.head.parameters(), *decoder.parameters()])
    assert _apart([*_given(training, "head"), *_given(training, "decoder")], wanted) < 1e-9


def test_the_gap_is_what_codes_that_saw_the_label_score_more() -> None:
    model, batch = _network(), _rows()
    metrics = DeepFacto(coupling=0.1, code_steps=300).bind(model, LOSS).step(batch)
    assert float(metrics["free_score"]) < 0.7 < 0.9 < float(metrics["informed_score"])
    assert float(metrics["code_gap"]) == float(metrics["informed_score"] - metrics["free_score"])


def test_the_step_reports_the_loss_of_the_deployed_network_before_it() -> None:
    model = _network()
    for recipe in (DeepFacto(), DeepFacto(through="implicit"), DeepFacto(through="block-admm")):
        training = recipe.bind(model, LOSS)
        for seed in range(3):
            batch = _rows(seed=seed)
            with torch.no_grad():
                before = LOSS(model.eval()(batch.x), batch.y)
            found = training.step(batch)["loss"]
            if bool(seed):  # before the first step the dictionary has seen nothing
                assert abs(float(found - before)) < 1e-12


def test_normalisation_and_dropout_in_the_encoder_are_seen_alike_and_move_once() -> None:
    made = _network()
    model = nn.Sequential(made[0], nn.BatchNorm1d(24, dtype=torch.float64), nn.Dropout(0.2), *made[1:])
    training = DeepFacto(through="block-admm", sweeps=3, local_steps=2).bind(model, LOSS)
    training.step(_rows())
    assert int(model[1].num_batches_tracked) == 1


def test_pictures_have_a_code_at_each_place() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), NMF(6, 3, dtype=torch.float64), nn.Flatten(), nn.Linear(3 * 9, 3)
    ).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 1, 5, 5, generator=generator, dtype=torch.float64)
    batch = Batch(x, torch.randint(3, (24,), generator=generator))
    for through in ("block-admm", "contrast", "implicit"):
        training = DeepFacto(through=through, lr=0.03).bind(model, LOSS)  # type: ignore[arg-type]
        found = [float(training.step(batch)["loss"]) for _ in range(25)]
        assert found[-1] < 0.9 * found[0], through
    assert factors.codes(model, x).shape == (24, 3, 3, 3)


def test_two_ranks_average_what_each_of_them_finds() -> None:
    batch = _rows(24)

    def work(group: Group) -> list[Tensor]:
        model = _network()
        found = factors.parts(model)
        with torch.no_grad():
            found.nmf.initialise(found.encoder(batch.x))
        training = DeepFacto(decoder=0.0, lr=0.01).bind(model, LOSS, group=group)
        share = slice(0, 24) if group.size == 1 else slice(12 * group.rank, 12 * group.rank + 12)
        for _ in range(3):
            training.step(Batch(batch.x[share], batch.y[share]))
        training.sync()
        return [one.detach().clone() for one in model.state_dict().values()]

    (alone,) = threads(1, work)
    for together in threads(2, work):
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("model", "recipe", "said"),
    [
        (partial(mlp, 5, [7], 3), DeepFacto(), "one NMF layer in it, and found 0 at its top level"),
        (lambda: nn.Sequential(*_network()[:3], NMF(3, 2), *_network()[3:]), DeepFacto(), "found 2 at its top level"),
        (lambda: nn.ModuleList([_network()]), DeepFacto(), r"found 0 at its top level \(1 in all\) in a ModuleList"),
        (lambda: nn.Sequential(*_network(), nn.Tanh()), DeepFacto(), "linear layers and ReLUs .* found Tanh"),
        (nn.Flatten, DeepFacto(), "nothing to train"),
    ],
)
def test_what_has_no_factors_is_refused(model: Any, recipe: DeepFacto, said: str) -> None:
    with pytest.raises(CannotTrain, match=said):
        recipe.bind(model(), LOSS)


def test_a_loss_without_a_bound_of_curvature_is_only_for_implicit_derivatives() -> None:
    with pytest.raises(CannotTrain, match="the hinge loss has none"):
        DeepFacto().bind(_network(), losses.Hinge())
    DeepFacto(through="implicit").bind(_network(), losses.Hinge()).step(_rows())


def test_negative_features_are_refused_with_what_to_do() -> None:
    made = _network()
    training = DeepFacto().bind(nn.Sequential(made[0], *made[2:]), LOSS)
    with pytest.raises(BadInput, match="put a ReLU in front"):
        training.step(_rows())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"coupling": 0.0}, "coupling must be above 0"),
        ({"through": "magic"}, "through must be one of the four ways"),
        ({"decoder": -1.0}, "decoder must be at least 0"),
        ({"dual_step": 2.0}, "dual_step must be in"),
        ({"code_steps": 0}, "code_steps must be at least 1"),
    ],
)
def test_settings_that_make_no_method_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        DeepFacto(**settings)


def test_factors_need_non_negative_hidden_units() -> None:
    with pytest.raises(BadInput, match="this network has the activation tanh"):
        mlp(5, [7], 3, activation="tanh", factors=2)
    with pytest.raises(BadInput, match="this network has no hidden layer"):
        mlp(5, [], 3, factors=2)
    with pytest.raises(BadInput, match="rank"):
        mlp(5, [7], 3, factors=8)


def test_a_dictionary_moves_once_a_step_of_block_admm_and_its_gradient_is_that_of_backpropagation() -> None:
    model, twin, batch = _network(), _network(), _rows()
    for one in (model, twin):
        factors.parts(one).nmf.initialise(factors.parts(one).encoder(batch.x).detach())
    training = BlockADMM(sweeps=1, optimizer=Kept, recompute=True, probe_every=0).bind(model, LOSS)
    training.step(batch)
    wanted = torch.autograd.grad(LOSS(twin(batch.x), batch.y), list(twin.parameters()))
    given = [tensor for block in training._blocks for tensor in block.optimizer.given[0]]  # type: ignore[attr-defined]
    assert _apart(given, wanted) < 1e-10
    assert torch.equal(factors.parts(model).nmf.held_gram, factors.parts(twin).nmf.held_gram)
    before = factors.parts(model).nmf.dictionary.clone()
    BlockADMM(sweeps=3, local_steps=2).bind(model, LOSS).step(batch)
    twin.train()(batch.x)
    assert not torch.equal(factors.parts(model).nmf.dictionary, before)
    assert torch.allclose(factors.parts(model).nmf.dictionary, factors.parts(twin).nmf.dictionary, atol=1e-12)


def test_the_factor_classifier_gives_the_codes_it_decides_by() -> None:
    x, y = load_iris(return_X_y=True)
    model = FactorClassifier(DeepFacto(lr=0.02), factors=4, hidden=(24,), epochs=40, batch_size=24).fit(x, y)
    assert model.score(x, y) > 0.9
    codes = model.transform(x)
    assert codes.shape == (150, 4)
    assert (codes >= 0).all()
    head = factors.parts(model.model_).head.double()
    with torch.no_grad():
        decided = head(torch.from_numpy(codes)).argmax(1).numpy()
    assert (model.classes_[decided] == model.predict(x)).all()
    assert np.allclose(np.linalg.norm(model.dictionary_, axis=0), 1)
    assert list(model.get_feature_names_out()) == [f"factorclassifier{number}" for number in range(4)]


def test_dead_features_are_told() -> None:
    model, batch = _network(), _rows()
    training = DeepFacto(lr=1e-3).bind(model, LOSS)
    training.step(batch)
    training.sync()  # says nothing: a warning is an error here
    with torch.no_grad():
        for parameter in factors.parts(model).encoder.parameters():
            parameter.copy_(-parameter.abs() - 10)
    training.step(Batch(batch.x.abs(), batch.y))
    with pytest.warns(UserWarning, match="all features in front of the NMF layer are 0"):
        training.sync()
