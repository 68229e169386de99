"""Predicted losses against the published tables of Pythia (`../shared/reference/group-sae`)."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import curve_fit

from groupsae.errors import InputError
from groupsae.grouping.matrix import Distances
from groupsae.grouping.partition import Partition
from groupsae.grouping.prediction import (
    CE_LOSS_SCORE,
    EXPLAINED_VARIANCE,
    FORMS,
    Form,
    Law,
    Observation,
    fit,
    left_out_errors,
    predict,
    why_not,
)
from tests.grouping.test_published import published

LAWS = {"explained_variance": EXPLAINED_VARIANCE, "ce_loss_score": CE_LOSS_SCORE}
MODELS = ("160m", "410m")
# Root mean square error on the left-out model of each of FORMS, and of a log n without diameter
ERRORS = {
    "explained_variance": [0.0079, 0.0054, 0.0041, 0.0053, 0.0037],
    "ce_loss_score": [0.0019, 0.0011, 0.0017, 0.0014, 0.0025],
}
# theta = 0.2 (Group-SAE v2): loss of explained variance, of CE-loss score
AT_THRESHOLD = {"160m": (6, 0.0109, 0.0021), "410m": (9, 0.0156, 0.0016)}


@pytest.mark.shared
@pytest.mark.parametrize("model", MODELS)
def test_the_published_sums_of_diameters_are_consistent(shared: Path, model: str) -> None:
    found = published_diameters(shared, model)
    for group, diameter in found.items():
        assert diameter > 0.1
        for other, wider in found.items():
            if set(group) < set(other):
                assert diameter < wider


@pytest.mark.shared
@pytest.mark.parametrize("metric", LAWS)
def test_the_constants_are_the_fit_of_the_published_tables(shared: Path, metric: str) -> None:
    law, ours = fit(observed(shared, metric)), LAWS[metric]
    assert law.form == ours.form
    assert f"{law.coefficient:.3g}" == f"{ours.coefficient:.3g}"
    assert (round(law.low, 2), round(law.high, 2)) == (ours.low, ours.high)
    assert round(law.error, 4) == ours.error


@pytest.mark.shared
@pytest.mark.parametrize("metric", LAWS)
def test_least_squares_agree_with_scipy_and_left_out_errors_with_the_stated_ones(
    shared: Path, metric: str
) -> None:
    data = observed(shared, metric)

    def fitted(term: Any, models: Sequence[str]) -> float:
        x, y = points(term, models)
        return float(curve_fit(lambda x, a: a * x, x, y)[0][0])

    def points(term: Any, models: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        found = [each for model in models for each in data[model]]
        x = [
            np.average([term(d, n) for d, n in zip(*each[:2], strict=True)], weights=each.sizes)
            for each in found
        ]
        return np.array(x), np.array([each.loss for each in found])

    terms = [
        lambda d, n: d,
        lambda d, n: d**2,
        lambda d, n: d * (1 - 1 / n),
        lambda d, n: d**2 * (1 - 1 / n),
        lambda d, n: np.log(n),
    ]
    errors = []
    for term in terms:
        residuals = []
        for left_out, other in (MODELS, MODELS[::-1]):
            x, y = points(term, [left_out])
            residuals.append(y - fitted(term, [other]) * x)
        errors.append(float(np.sqrt(np.mean(np.concatenate(residuals) ** 2))))
    assert [round(error, 4) for error in errors] == ERRORS[metric]
    law = fit(data)
    assert law.error == pytest.approx(min(errors[: len(FORMS)]), rel=1e-6)
    assert FORMS[int(np.argmin(errors[: len(FORMS)]))] == law.form
    assert law.coefficient == pytest.approx(fitted(terms[FORMS.index(law.form)], MODELS), rel=1e-6)
    relative = np.concatenate([each.relative for each in left_out_errors(law.form, data).values()])
    assert np.mean((relative >= law.low) & (relative <= law.high)) == pytest.approx(0.9, abs=0.05)


@pytest.mark.shared
@pytest.mark.parametrize("model", MODELS)
def test_the_published_losses_at_the_threshold_are_within_the_predicted_range(
    shared: Path, model: str
) -> None:
    G, *losses = AT_THRESHOLD[model]
    for metric, loss in zip(LAWS, losses, strict=True):
        found = observed(shared, metric)[model][G - 1]
        assert round(found.loss, 4) == loss
        predicted = LAWS[metric].predict(found.diameters, found.sizes)
        assert predicted.low < loss < predicted.high


@pytest.mark.shared
def test_a_model_that_is_in_no_fit(shared: Path) -> None:
    """Pythia 1B at theta = 0.2: its AMAD is known, its diameters are not.

    Ascending diameters from 0.14 with a known sum are mixtures of those of which the largest j are
    equal and the others 0.14; both terms are smallest and largest at one of these.
    """
    sizes = [2, 2, 2, 2, 3, 4]
    mixtures = [[0.14] * (6 - j) + [0.14 + (6 * 0.191 - 6 * 0.14) / j] * j for j in range(1, 7)]
    stated = {
        "explained_variance": (0.016, 0.020, 0.0216),
        "ce_loss_score": (0.0018, 0.0033, 0.002),
    }
    for metric, (least, most, loss) in stated.items():
        baseline, cluster = (
            read(shared / "reference" / "group-sae" / f"pythia-1b_{kind}.csv", metric)
            for kind in ("baseline", "cluster")
        )
        found = np.mean([baseline[0, layer] - cluster[6, layer] for layer in range(15)])
        assert found == pytest.approx(loss, abs=0.00005)
        predictions = [LAWS[metric].predict(each, sizes) for each in mixtures]
        means = [each.mean for each in predictions]
        assert min(means) == pytest.approx(least, rel=0.02)
        assert max(means) == pytest.approx(most, rel=0.02)
        assert predictions[-1].low < loss < predictions[-1].high  # of equal diameters


@pytest.mark.shared
def test_rounding_of_the_published_amad_hardly_moves_the_coefficients(shared: Path) -> None:
    random = np.random.default_rng(0)
    for metric, law in LAWS.items():
        for _ in range(5):
            shifted = observed(shared, metric, lambda: random.uniform(-0.0005, 0.0005))
            assert fit(shifted).coefficient == pytest.approx(law.coefficient, rel=0.01)


groups = st.lists(
    st.one_of(
        st.just((0.0, 1)), st.tuples(st.floats(0, 1, allow_subnormal=False), st.integers(2, 30))
    ),
    min_size=1,
    max_size=12,
)


@given(groups, st.data())
def test_a_wider_group_is_never_predicted_to_lose_less(groups: Any, data: Any) -> None:
    diameters, sizes = map(list, zip(*groups, strict=True))
    before = predict(diameters, sizes)
    at = data.draw(st.integers(0, len(groups) - 1))
    if sizes[at] > 1:
        diameters[at] = data.draw(st.floats(diameters[at], 1))
    for less, more in zip(before, predict(diameters, sizes), strict=True):
        assert more.mean >= less.mean
        assert 0 <= less.low <= less.mean <= less.high


@given(st.integers(1, 50))
def test_singletons_are_predicted_to_lose_exactly_nothing(n_layers: int) -> None:
    prediction = predict([0.0] * n_layers, [1] * n_layers)
    assert prediction == ((0, 0, 0), (0, 0, 0))


def test_a_prediction_is_the_mean_over_layers() -> None:
    pair_and_single = predict([0.2, 0.0], [2, 1])
    assert pair_and_single.explained_variance.mean == pytest.approx(0.138 * 0.2 / 2 * 2 / 3)
    assert pair_and_single.ce_loss_score.mean == pytest.approx(0.0496 * 0.2**2 * 2 / 3)
    assert pair_and_single.ce_loss_score.low == pytest.approx(0.0496 * 0.04 * 2 / 3 * 0.68)


@given(st.sampled_from(FORMS), st.floats(0.001, 1), st.integers(0, 99))
def test_a_law_that_holds_exactly_is_found(form: Form, coefficient: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    truth = Law(form, coefficient, 0.0, 0.0, 0.0)
    models = {}
    for name in "abc":
        shapes = [(random.uniform(0.05, 0.6, 3), random.integers(2, 20, 3)) for _ in range(5)]
        models[name] = [
            Observation(d.tolist(), n.tolist(), truth.predict(d.tolist(), n.tolist()).mean)
            for d, n in shapes
        ]
        models[name].append(Observation([0.0, 0.0], [1, 1], 0.0))  # passed over
    law = fit(models)
    assert law.form == form
    assert law.coefficient == pytest.approx(coefficient)
    assert max(abs(law.low), abs(law.high), law.error) < 1e-9


PAIR = Observation([0.2], [2], 0.01)


@pytest.mark.parametrize(
    ("observed", "problem"),
    [
        ({"a": [PAIR]}, "holds 1 models; .*at least 2"),
        ({"a": [PAIR], "b": []}, r"observed\['b'\]: no partition .* add one"),
        ({"a": [PAIR], "b": [Observation([0.0], [1], 0.0)]}, r"observed\['b'\]: no partition"),
        ({"a": [PAIR], "b": [PAIR._replace(loss=float("nan"))]}, r"observed\['b'\]: a loss is nan"),
        ({"a": [PAIR], "b": [PAIR._replace(loss=-0.01)]}, "not above 0; .*baseline less group"),
        ({"a": [PAIR], "b": [PAIR._replace(sizes=[0])]}, "sizes: holds 0"),
    ],
)
def test_what_cannot_be_fitted_is_refused(observed: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        fit(observed)


@pytest.mark.parametrize(
    ("diameters", "sizes", "problem"),
    [
        ([], [], "diameters: 0 of 0 groups"),
        ([0.1], [2, 2], "diameters: 1 of 2 groups"),
        ([-0.1], [2], r"holds -0.1; .*\[0, 1\]"),
        ([1.1], [2], r"holds 1.1; .*angle / pi"),
        ([float("nan")], [2], "holds nan"),
        ([0.1], [1], "a group of 1 layer has 0.1"),
    ],
)
def test_what_are_no_groups_is_refused(
    diameters: list[float], sizes: list[int], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        predict(diameters, sizes)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ({"center": True}, None),
        ({"center": False}, "centred distances only, these are not"),
        ({}, "whether the distances are centred is unknown"),
        ({"center": True, "similarity": "cka"}, "angular distances only, these are 1 − linear CKA"),
    ],
)
def test_only_centred_angular_distances_predict(kind: dict[str, Any], reason: str | None) -> None:
    found = why_not(Distances.from_matrix(np.zeros((2, 2)), **kind))
    assert found is None if reason is None else reason in found


def observed(
    shared: Path, metric: str, rounding: Any = lambda: 0.0
) -> dict[str, list[Observation]]:
    """Each model's partitions for G = 1, 2, ... with their mean loss over layers."""
    data = {}
    for model in MODELS:
        partitions, _ = published(shared, model)
        diameters = published_diameters(shared, model, rounding)
        baseline, cluster = (
            read(shared / "reference" / "group-sae" / f"pythia-{model}_{kind}.csv", metric)
            for kind in ("baseline", "cluster")
        )
        data[model] = [
            Observation(
                diameters=[diameters.get(group, 0.0) for group in partition.groups],
                sizes=[len(group) for group in partition.groups],
                loss=float(
                    np.mean([baseline[0, each] - cluster[G, each] for each in partition.layers])
                ),
            )
            for G, partition in sorted(partitions.items())
        ]
    return data


def published_diameters(
    shared: Path, model: str, rounding: Any = lambda: 0.0
) -> dict[tuple[int, ...], float]:
    """Every group of more than one layer with its diameter, from sums of them: G * AMAD(G)."""
    partitions, amads = published(shared, model)
    layers = partitions[1].layers
    partitions[len(layers)] = Partition.from_sizes(layers, [1] * len(layers))
    sums = {G: G * (value + rounding()) for G, value in amads.items()} | {len(layers): 0.0}
    found: dict[tuple[int, ...], float] = {}
    for finer, coarser in pairwise(sorted(partitions, reverse=True)):
        gone = set(partitions[finer].groups) - set(partitions[coarser].groups)
        (merged,) = set(partitions[coarser].groups) - set(partitions[finer].groups)
        assert sorted(sum(gone, ())) == list(merged)  # refined by the next
        parts = sum(found.get(group, 0.0) for group in gone)
        found[merged] = sums[coarser] - sums[finer] + parts
    return found


def read(file: Path, metric: str) -> dict[tuple[int, int], float]:
    """(G, layer) -> the metric."""
    with file.open(newline="") as lines:
        return {
            (int(float(row["G"])), int(float(row["layer"]))): float(row[metric])
            for row in csv.DictReader(lines)
        }
