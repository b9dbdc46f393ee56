from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures
from sklearn.utils.estimator_checks import parametrize_with_checks

import piecework
from piecework import (
    ADMM,
    CG,
    LBFGS,
    SGD,
    Adam,
    BadInput,
    CannotTrain,
    Classifier,
    DeepFacto,
    DidNotSolve,
    FactorClassifier,
    GaussNewton,
    Regressor,
    Softmax,
)
from piecework.nn import Standardise

IRIS = load_iris(return_X_y=True)
CANCER = load_breast_cancer(return_X_y=True)
DIABETES = load_diabetes(return_X_y=True, scaled=False)


@parametrize_with_checks(
    [
        Classifier(),
        Regressor(),
        Classifier(method=Adam(lr=2e-2), hidden=(8,), epochs=5, batch_size=16, dtype="float64"),
        Classifier(method=LBFGS(), hidden=(8,), loss="softmax", steps=8, validation=0.2, patience=4),
        Regressor(GaussNewton(), hidden=(5,), activation="tanh", dtype="float64", steps=8),
        FactorClassifier(DeepFacto(lr=0.03, code_steps=5), factors=4, hidden=(24,), epochs=15, batch_size=32),
    ]
)
def test_scikit_learn_finds_nothing_to_object_to(estimator: Any, check: Any) -> None:
    check(estimator)


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [ADMM(), GaussNewton(), SGD(), Adam(lr=1e-2), LBFGS(), CG()], ids=lambda m: type(m).__name__
)
def test_every_method_learns_three_classes(method: Any) -> None:
    model = Classifier(method=method, hidden=(12,), batch_size=24).fit(*IRIS)
    assert model.score(*IRIS) > 0.95
    assert model.history_.rows[-1]["train"]["score"] == pytest.approx(model.score(*IRIS))


@pytest.mark.parametrize("loss", ["auto", "squared", "hinge", "logistic", "softmax", Softmax(label_smoothing=0.1)])
def test_every_loss_decides_between_two_classes_as_its_outputs_say(loss: Any) -> None:
    x, y = CANCER
    names = np.array(["malignant", "benign"])
    model = Classifier(loss=loss, hidden=(8,), steps=8).fit(x, names[y])
    assert list(model.classes_) == ["benign", "malignant"]
    assert model.score(x, names[y]) > 0.95
    decided = model.decision_function(x)
    assert decided.shape == (569,)
    assert (model.classes_[(decided > 0).astype(int)] == model.predict(x)).all()


def test_a_regression_answers_in_the_units_of_its_targets() -> None:
    x, y = DIABETES
    x_train, x_test, y_train, y_test = train_test_split(x, y, random_state=0)
    model = Regressor(hidden=(24,), steps=10).fit(x_train, 1e4 + 50 * y_train)
    assert model.score(x_test, 1e4 + 50 * y_test) > 0.2
    assert model.target_mean_ == pytest.approx(1e4 + 50 * y_train.mean())
    assert model.predict(x_train).mean() == pytest.approx(1e4 + 50 * y_train.mean(), rel=1e-3)


def test_several_targets_of_very_different_size_are_learnt_together() -> None:
    x, y = DIABETES
    both = np.stack([y, 1e6 - 1e5 * x[:, 2], np.full(len(y), 7.0)], axis=1)
    model = Regressor(hidden=(24,), steps=20).fit(x, both)
    predicted = model.predict(x)
    assert predicted.shape == both.shape
    assert np.corrcoef(predicted[:, 0], y)[0, 1] > 0.7
    assert np.corrcoef(predicted[:, 1], x[:, 2])[0, 1] < -0.95
    assert predicted[:, 2] == pytest.approx(np.full(len(y), 7.0), abs=0.05)
    assert Regressor(hidden=(3,), steps=2).fit(x, y[:, None]).predict(x).shape == (442, 1)


def test_bytes_constant_columns_and_no_hidden_layer_are_fine() -> None:
    x, y = IRIS
    pixels = np.concatenate([(10 * x).astype(np.uint8), np.full((150, 1), 3, dtype=np.uint8)], axis=1)
    linear = Classifier(hidden=(), method=Adam(lr=0.05), epochs=20).fit(pixels, y)
    assert linear.score(pixels, y) > 0.9
    assert Classifier(hidden=(12,)).fit(pixels, y).score(pixels, y) > 0.9


# -- what is left behind -----------------------------------------------------------------------------------------------


def test_the_network_takes_raw_features() -> None:
    x, y = DIABETES
    model = Regressor(hidden=(5,), steps=4, dtype="float64").fit(x, y)
    assert isinstance(model.model_[0], Standardise)
    assert not model.model_.training
    z = model.model_(torch.from_numpy(x)).detach().numpy()
    assert (z * model.target_scale_ + model.target_mean_)[:, 0] == pytest.approx(model.predict(x), rel=1e-12)


def test_probabilities_are_there_only_where_the_loss_gives_some() -> None:
    x, y = CANCER
    for loss, method in (("auto", None), ("squared", Adam()), ("hinge", None), ("no such loss", None)):
        assert not hasattr(Classifier(loss=loss, method=method), "predict_proba")
    for loss, method in (("auto", Adam()), ("softmax", None), ("logistic", None)):
        model = Classifier(loss=loss, method=method, hidden=(5,), steps=5)
        assert hasattr(model, "predict_proba")
        chances = model.fit(x, y).predict_proba(x)
        assert chances.shape == (569, 2)
        assert chances.sum(1) == pytest.approx(np.ones(569))
        assert (chances.argmax(1) == model.predict(x)).all()
    fitted = Classifier(hidden=(5,), steps=2).fit(x, y)
    assert not hasattr(fitted.set_params(loss="softmax"), "predict_proba")  # it was not trained with that loss
    with pytest.raises(AttributeError) as refusal:
        fitted.predict_proba(x)
    assert "the squared loss gives no probabilities; use loss='softmax'" in str(refusal.value.__cause__)


def test_limits_and_the_steps_they_allow() -> None:
    x, y = IRIS
    assert Classifier(hidden=(3,)).fit(x, y).n_iter_ == 30
    assert Classifier(hidden=(3,), method=Adam(), batch_size=50).fit(x, y).n_iter_ == 90
    assert Classifier(hidden=(3,), method=Adam(), batch_size=50, epochs=2).fit(x, y).n_iter_ == 6
    timed = Classifier(hidden=(3,), seconds=0.05).fit(x, y)
    assert timed.history_.stopped_by == "seconds"
    assert len(timed.history_) >= 1


def test_patience_stops_by_the_rows_held_back_and_keeps_the_best_network() -> None:
    x, y = CANCER
    model = Classifier(method=Adam(lr=0.03), hidden=(24,), validation=0.2, patience=3, batch_size=64).fit(x, y)
    history = model.history_
    assert history.stopped_by == "patience"
    assert history.deployed_step == history.best["step"] < model.n_iter_
    assert history.summary()["rows"] == 455


def test_two_fits_are_the_same_and_another_seed_is_not() -> None:
    x, y = DIABETES
    model = Regressor(method=Adam(lr=1e-2), hidden=(5,), epochs=3, validation=0.2)
    first = model.fit(x, y).predict(x)
    assert (clone(model).fit(x, y).predict(x) == first).all()
    assert (model.fit(x, y).predict(x) == first).all()
    drawn = np.random.RandomState(3)
    for state in (1, drawn, drawn, None):
        assert not (clone(model).set_params(random_state=state).fit(x, y).predict(x) == first).any()


def test_global_generators_and_torchs_threads_are_left_alone() -> None:
    x, y = IRIS
    threads, theirs, numpys = torch.get_num_threads(), torch.get_rng_state(), np.random.get_state()[1].copy()
    for method in (None, ADMM(mode="taylor2016"), Adam()):
        Classifier(method=method, hidden=(5,), steps=3, random_state=None).fit(x, y).predict(x)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), theirs)
    assert (np.random.get_state()[1] == numpys).all()


def test_a_fitted_one_comes_back_from_a_pickle() -> None:
    x, y = IRIS
    model = Classifier(method=Adam(lr=1e-2), hidden=(5,), epochs=3).fit(x, y)
    again = pickle.loads(pickle.dumps(model))
    assert (again.decision_function(x) == model.decision_function(x)).all()
    assert again.history_.rows == model.history_.rows


def test_progress_is_reported_only_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    Classifier(hidden=(3,), steps=2).fit(*IRIS)
    assert capsys.readouterr() == ("", "")
    Classifier(hidden=(3,), steps=2, verbose=True).fit(*IRIS)
    said = capsys.readouterr()
    assert said.out == ""
    assert "ADMM 4-3-3" in said.err


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_of_the_method_and_the_loss_are_parameters() -> None:
    model = Classifier()
    assert model.get_params(deep=False)["method"] is None
    assert model.get_params()["method__ridge"] == ADMM().ridge
    assert model.set_params(method__ridge=0.5, method__flips=False).method == ADMM(ridge=0.5, flips=False)
    assert model.set_params(method=Adam(), method__lr=0.1).method == Adam(lr=0.1)
    assert "method__ridge" not in model.get_params()
    assert model.set_params(loss=Softmax(), loss__label_smoothing=0.2).loss == Softmax(label_smoothing=0.2)
    assert clone(model).get_params() == model.get_params()
    assert "Adam(lr=0.1" in repr(model)
    assert "method" in model._repr_html_()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"hiden": (3,)}, r"Classifier has no parameter 'hiden' \(did you mean 'hidden'\?\); it has activation, batch"),
        ({"method__rigde": 1}, r"ADMM has no setting 'rigde' \(did you mean 'ridge'\?\); it has mode, gamma"),
        ({"method": Adam(), "method__ridge": 1}, r"Adam has no setting 'ridge'; it has lr"),
        ({"method__ridge": -1.0}, r"ridge must not be negative, got -1\.0"),
        ({"method__ridge__more": 1}, r"ridge of ADMM is 1\.0, which has no settings of its own"),
        ({"hidden__width": 3}, r"hidden has no settings of its own, so hidden__width cannot be set"),
    ],
)
def test_wrong_parameters_are_refused_and_nothing_is_set(wrong: dict[str, Any], sentence: str) -> None:
    model = Classifier()
    with pytest.raises(BadInput, match=sentence):
        model.set_params(steps=3, **wrong)
    assert model.get_params() == Classifier().get_params()


def test_a_grid_over_a_setting_of_the_method() -> None:
    x, y = CANCER
    search = GridSearchCV(Classifier(hidden=(5,), steps=5), {"method__ridge": [0.1, 1.0, 10.0]}, cv=3)
    search.fit(x, y)
    assert search.best_score_ > 0.94
    assert search.best_estimator_.method == ADMM(ridge=search.best_params_["method__ridge"])
    by_ranking = cross_val_score(Classifier(hidden=(5,), steps=5), x, y, scoring="roc_auc", cv=3)
    assert by_ranking.min() > 0.97


def test_at_the_end_of_a_pipeline() -> None:
    x, y = DIABETES
    line = make_pipeline(PolynomialFeatures(2), Regressor(hidden=(5,), steps=5))
    line.set_params(regressor__method__ridge=0.5).fit(x[:300], y[:300])
    assert line[-1].n_features_in_ == 66  # the first of them is constant
    assert line[-1].method == ADMM(ridge=0.5)
    assert line.score(x[300:], y[300:]) > 0.3


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kind", "sentence"),
    [
        ({"method": ADMM}, BadInput, r"method takes a recipe such as ADMM\(\) or Adam\(lr=1e-3\), got <class"),
        ({"method": "adam"}, BadInput, r"method takes a recipe such as ADMM\(\) or Adam\(lr=1e-3\), got 'adam'"),
        ({"hidden": 100}, BadInput, r"for example \(100,\) or \(64, 64\), got 100"),
        ({"hidden": (3, 0)}, BadInput, r"hidden takes the widths of the hidden layers, .* got \(3, 0\)"),
        ({"activation": "swish"}, BadInput, r"no activation 'swish'; there are relu"),
        ({"loss": "cross"}, BadInput, r"no loss 'cross'; there are squared"),
        ({"loss": Softmax}, BadInput, r"loss takes a name or a loss such as Softmax\(\), got <class"),
        ({"loss": "logistic"}, CannotTrain, r"the logistic loss is for two classes and one output, .* use softmax"),
        ({"steps": 0}, BadInput, r"steps must be a whole number, at least 1, got 0"),
        ({"method": Adam(), "batch_size": 0}, BadInput, r"batch_size must be at least 1 row, got 0"),
        ({"patience": 3}, BadInput, r"patience looks at rows that are held back, and there are none; give validation="),
        ({"validation": 1}, BadInput, r"validation is the part of the rows that is held back, from 0 to 1, got 1"),
        ({"validation": 0.99}, BadInput, r"validation=0\.99 of 150 rows leaves 2 to train on and 148 held back; at "),
        ({"random_state": -1}, BadInput, r"random_state must be a whole number from 0 to 2\^63 - 1, .* got -1"),
        ({"dtype": "float16"}, BadInput, r"dtype must be 'float32' or 'float64', got 'float16'"),
    ],
)
def test_unusable_settings_are_refused_in_a_sentence(settings: dict[str, Any], kind: Any, sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        Classifier(**settings).fit(*IRIS)


def test_unusable_data_are_refused_in_a_sentence() -> None:
    x, y = IRIS
    with pytest.raises(BadInput, match=r"y has one class, .*0.*, in every row; a classifier needs at least two"):
        Classifier().fit(x[:50], y[:50])
    with pytest.raises(CannotTrain, match="the hinge loss is for classes and the targets are real numbers"):
        Regressor(loss="hinge").fit(*DIABETES)
    with pytest.raises(BadInput, match=r"X: column 3 varies by .* around 1e.06, too little for float32"):
        Regressor().fit(np.where(np.arange(4) == 3, 1e6 + 1e-3 * x, x), y)
    with pytest.raises(BadInput, match="the targets are too far apart to be standardised"):
        Regressor().fit(x, 1e300 * (y - 1))
    model = Regressor(hidden=(), steps=2).fit(x, y)
    with pytest.raises(BadInput, match="the network's outputs are not finite for some of these rows"):
        model.predict(np.full((1, 4), 1e308))


def test_a_training_that_diverged_is_an_error() -> None:
    with pytest.raises(DidNotSolve, match=r"the training diverged: the loss was not finite at step \d+; lower the lea"):
        Regressor(method=SGD(lr=1e6), hidden=(5,)).fit(*DIABETES)


def test_scikit_learn_is_loaded_when_an_estimator_is_asked_for() -> None:
    code = (
        "import sys, piecework\n"
        "assert 'sklearn' not in sys.modules\n"
        "assert piecework.Classifier is not piecework.Regressor\n"
        "assert 'sklearn' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
    assert {"Classifier", "Regressor"} <= set(piecework.__all__)
