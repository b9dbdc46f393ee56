"""Networks that can be cut: the residual one and the transformer, and sequences through losses and evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from piecework import Adam, BadInput, Batch, CannotTrain, Local, data, losses
from piecework.evaluation import merged, sums
from piecework.models import resnet, transformer
from piecework.testing import threads

LOSS = losses.Softmax()


def _small(**more: Any) -> Any:
    return transformer(11, **{"width": 12, "depth": 3, "heads": 3, "context": 7, "dtype": torch.float64, **more})


def _text(n: int = 5) -> Batch:
    x = torch.randint(11, (n, 7), generator=torch.Generator().manual_seed(0))
    return Batch(x, (x + x.roll(1, 1)) % 11)


@pytest.mark.parametrize(
    "make", [_small, lambda **more: resnet((1, 8, 8), 3, width=4, **more)], ids=["text", "pictures"]
)
def test_only_the_seed_decides_the_weights_and_the_global_generator_stays(make: Any) -> None:
    state = torch.get_rng_state()
    one, other, third = make(seed=1), make(seed=1), make(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), third.parameters(), strict=True))
    assert all(bool(value.isfinite().all()) for value in one.state_dict().values())


def test_a_token_sees_none_that_comes_after_it() -> None:
    model, x = _small(), _text().x
    changed = x.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    before, after = model(x), model(changed)
    assert before.shape == (5, 7, 11)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])
    assert torch.equal(model(x.double()), before)  # whole numbers of any dtype
    assert torch.allclose(model(x[:, :3]), before[:, :3])


def test_tied_matrices_are_one_and_are_not_cut_apart() -> None:
    model = _small(tied=True)
    assert model[-1].weight is model[0].tokens.weight
    with pytest.raises(CannotTrain, match="share a parameter"):
        Local().bind(model, LOSS)


def test_the_residual_network_learns_digits_in_two_blocks() -> None:
    digits = data.load("digits", rows=400)
    model = resnet((1, 8, 8), 10, width=8)
    x = digits.train.x.float() / 16
    training = Local(lr=0.01, coupling="overlap").bind(model, LOSS)
    for seed in range(40):
        rows = torch.randperm(400, generator=torch.Generator().manual_seed(seed))[:100]
        metrics = training.step(Batch(x[rows], digits.train.y[rows]))
    assert float(metrics["loss"]) < 0.3


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: transformer(11, width=10, heads=3), "a width that its heads divide"),
        (lambda: transformer(11, dropout=1.0), "dropout must be in"),
        (lambda: resnet((8, 8), 3), "channels, height, width"),
        (lambda: resnet((1, 8, 8), 0), "sizes of at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        make()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_sequences_is_the_mean_over_their_tokens(smoothing: float) -> None:
    loss, batch = losses.Softmax(label_smoothing=smoothing), _text()
    z = _small()(batch.x).detach()
    each = torch.stack([loss(z[row], batch.y[row]) for row in range(5)])  # a sequence's tokens as rows
    assert torch.allclose(loss(z, batch.y), each.mean())
    assert torch.allclose(loss.total(z, batch.y), each.sum())


def test_the_score_of_sequences_is_the_part_of_tokens_decided_right(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = _small(), _text(9)
    found = merged([sums(model, batch, slice(0, 9), LOSS, "multiclass")], "multiclass")
    z = model(batch.x).detach()
    assert found["score"] == pytest.approx(float((z.argmax(2) == batch.y).double().mean()))
    assert found["loss"] == pytest.approx(float(LOSS(z, batch.y)))
    monkeypatch.setattr("piecework.evaluation.TILE", 16)
    again = merged([sums(model, batch, slice(0, 9), LOSS, "multiclass")], "multiclass")
    assert again["loss"] == pytest.approx(found["loss"])


@pytest.mark.parametrize("method", [Adam(lr=0.01), Local(lr=0.01), Local(lr=0.01, coupling="interlock", blocks=3)])
def test_a_language_is_learnt(method: Any) -> None:
    training = method.bind(_small(dropout=0.1), LOSS)
    told = [float(training.step(_text(24))["loss"]) for _ in range(60)]
    assert told[-1] < 0.5 * told[0]


def test_two_ranks_train_a_transformer_to_the_bits_of_one() -> None:
    def work(group: Any) -> list[torch.Tensor]:
        model = _small(dropout=0.2)
        training = Local(coupling="overlap", probe_every=2).bind(model, LOSS, group=group)
        for _ in range(4):
            training.step(_text(24))
        training.sync()
        return [one.detach() for one in model.parameters()]

    alone = threads(1, work)[0]
    for found in threads(2, work):
        assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))


def test_a_method_that_needs_closed_forms_says_so_of_sequences() -> None:
    with pytest.raises(CannotTrain, match="no closed forms for sequences"):
        LOSS.residual(_small()(_text().x).detach(), _text().y)
