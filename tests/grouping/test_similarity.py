from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cross_decomposition import CCA
from torch import Tensor

from groupsae.errors import InputError
from groupsae.grouping.distance import AngularDistances
from groupsae.grouping.matrix import Distances
from groupsae.grouping.similarity import (
    DISTANCES,
    MINIBATCH,
    CKADistances,
    SVCCADistances,
    unbiased_hsic,
)
from tests.grouping.matrices import seeds

OTHERS = [CKADistances, SVCCADistances]


def similar_streams(
    n_layers: int = 4, n_tokens: int = 1000, d_model: int = 8, seed: int = 0
) -> Tensor:
    """Each layer adds something to the one before; some directions are larger than others."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(n_layers, n_tokens, d_model, generator=generator, dtype=torch.float64)
    return (steps * torch.logspace(0, -1, d_model)).cumsum(0) + 3.0


def measure(
    kind: type[AngularDistances | CKADistances | SVCCADistances], streams: Tensor, calls: int = 1
) -> Distances:
    distances = kind(range(len(streams)))
    for part in streams.tensor_split(calls, dim=1):
        distances.update(part)
    return distances.result()


def dense_hsic(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimator as Song et al. 2012 write it, with whole Gram matrices."""
    n = len(x)
    K, L = x @ x.T, y @ y.T
    np.fill_diagonal(K, 0)
    np.fill_diagonal(L, 0)
    one = np.ones(n)
    terms = (
        np.trace(K @ L)
        + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (one @ K @ L @ one)
    )
    return float(terms / (n * (n - 3)))


def biased_cka(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    norms = [np.linalg.norm(a.T @ a) for a in (x, y)]
    return float(np.linalg.norm(x.T @ y) ** 2 / math.prod(norms))


def dense_svcca(x: np.ndarray, y: np.ndarray, variance: float = 0.99) -> float:
    """By SVDs of the data and, for the correlations, of the product of their bases (QR)."""
    bases = []
    for data in (x, y):
        u, s, _ = np.linalg.svd(data - data.mean(0), full_matrices=False)
        share = np.cumsum(s**2) / np.sum(s**2)
        kept = int(np.argmax(share >= variance)) + 1
        bases.append(np.linalg.qr(u[:, :kept] * s[:kept])[0])
    return float(np.linalg.svd(bases[0].T @ bases[1], compute_uv=False).mean())


# CKA.


@pytest.mark.parametrize("n_tokens", [4, 5, 100, MINIBATCH, 2 * MINIBATCH - 1])
def test_one_minibatch_is_the_dense_estimator(n_tokens: int) -> None:
    streams = similar_streams(n_tokens=n_tokens)
    hsic = unbiased_hsic(streams)
    x = streams.numpy()
    expected = np.array([[dense_hsic(x[p], x[q]) for q in range(4)] for p in range(4)])
    np.testing.assert_allclose(hsic.numpy(), expected, rtol=1e-8, atol=1e-9)
    own = np.sqrt(np.diagonal(expected))
    cka = np.clip(expected / own / own[:, None], 0, 1)
    measured = measure(CKADistances, streams)
    np.testing.assert_allclose(measured.matrix, 1 - cka, rtol=0, atol=1e-8)
    assert measured.tokens == n_tokens


def test_minibatches_are_averaged_before_the_ratio_is_taken() -> None:
    """One call of three minibatches, which take every third token, and one of two and a bit."""
    streams = similar_streams(n_tokens=5 * MINIBATCH + 77)
    calls = streams[:, : 3 * MINIBATCH], streams[:, 3 * MINIBATCH :]
    batches = [calls[0][:, i::3] for i in range(3)] + [calls[1][:, i::2] for i in range(2)]
    total = np.zeros((4, 4))
    for batch in batches:
        x = batch.numpy()
        hsic = [[dense_hsic(x[p], x[q]) for q in range(4)] for p in range(4)]
        total += x.shape[1] * np.array(hsic)
    own = np.sqrt(np.diagonal(total))
    distances = CKADistances(range(4))
    for call in calls:
        distances.update(call)
    expected = 1 - total / own / own[:, None]
    np.testing.assert_allclose(distances.result().matrix, expected, rtol=0, atol=1e-9)


@given(seeds)
@settings(deadline=None, max_examples=20)
def test_cka_does_not_see_shift_rotation_and_scale_of_a_layer(seed: int) -> None:
    streams = similar_streams(n_tokens=300, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(4, 8, 8, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(random).Q
    scale = torch.rand(4, 1, 1, generator=generator, dtype=torch.float64) * 100 + 0.01
    shift = torch.randn(4, 1, 8, generator=generator, dtype=torch.float64)
    same = measure(CKADistances, (streams @ rotation) * scale + shift).matrix
    np.testing.assert_allclose(same, measure(CKADistances, streams).matrix, rtol=0, atol=1e-9)


def test_cka_sees_another_linear_map() -> None:
    streams = similar_streams(n_layers=2)
    stretched = streams.clone()
    stretched[1] *= torch.logspace(0, 2, 8)
    there = measure(CKADistances, streams).matrix[0, 1]
    assert abs(measure(CKADistances, stretched).matrix[0, 1] - there) > 0.1


def test_layers_with_nothing_in_common_have_no_cka_where_the_biased_one_is_large() -> None:
    generator = torch.Generator().manual_seed(0)
    streams = torch.randn(2, 20 * MINIBATCH, 512, generator=generator)
    # Of one minibatch the biased estimate is d / (d + n) or so.
    x = streams[:, :MINIBATCH].numpy().astype(np.float64)
    assert biased_cka(*x) > 0.6
    measured = measure(CKADistances, streams, calls=4)
    assert measured.matrix[0, 1] == pytest.approx(1, abs=0.01)


def test_a_negative_estimate_is_no_distance_above_one() -> None:
    """Two layers without any correlation, where chance alone would give some."""
    x = torch.tensor([[1, -1, 1, -1, 1, -1, 1, -1], [1, 1, -1, -1, 1, 1, -1, -1]]).double()[
        ..., None
    ]
    assert dense_hsic(*x.numpy()) < 0
    assert measure(CKADistances, x).matrix[0, 1] == 1


def test_the_standard_error_is_the_spread_between_repetitions() -> None:
    """Of calls that are independent draws."""
    estimates, errors = [], []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        shared, own = torch.randn(2, 12 * 64, 6, generator=generator, dtype=torch.float64)
        distances = CKADistances(range(2))
        for first, second in zip(shared.split(64), own.split(64), strict=True):
            # Four copies in a call: its tokens are not independent, as those of a context.
            call = torch.stack([first, 0.7 * first + second]).repeat(1, 4, 1)
            distances.update(call)
        result = distances.result()
        assert result.standard_error is not None
        assert not np.diagonal(result.standard_error).any()
        estimates.append(result.matrix[0, 1])
        errors.append(result.standard_error[0, 1])
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.25)


def test_one_call_alone_has_no_standard_error() -> None:
    assert measure(CKADistances, similar_streams()).standard_error is None
    assert measure(CKADistances, similar_streams(), calls=2).standard_error is not None


@pytest.mark.parametrize("size", [1, 3, 100, 255])
def test_small_calls_wait_until_they_make_a_minibatch(size: int) -> None:
    """No token is lost, and the estimate stays near that of one call."""
    streams = similar_streams(n_tokens=1500)
    distances = CKADistances(range(4))
    for part in streams.split(size, dim=1):
        distances.update(part)
    measured = distances.result()
    again = distances.result()  # does not count what waits twice
    assert measured.tokens == again.tokens
    assert 1500 - measured.tokens < 4
    np.testing.assert_array_equal(measured.matrix, again.matrix)
    np.testing.assert_allclose(
        measured.matrix, measure(CKADistances, streams).matrix, rtol=0, atol=0.02
    )


def test_cka_needs_four_tokens() -> None:
    with pytest.raises(InputError, match="CKA needs at least 4"):
        measure(CKADistances, similar_streams(n_tokens=3))


# SVCCA.


def test_svcca_is_that_of_the_data_themselves() -> None:
    streams = similar_streams(d_model=12)
    x = streams.numpy()
    measured = measure(SVCCADistances, streams)
    for p in range(4):
        for q in range(p):
            assert measured.matrix[p, q] == pytest.approx(1 - dense_svcca(x[p], x[q]), abs=1e-10)
    assert measured.standard_error is None
    # 99% are fewer directions than all: it is the truncation that is compared.
    assert abs(dense_svcca(x[0], x[1]) - dense_svcca(x[0], x[1], 1 - 1e-12)) > 1e-3


def test_with_all_of_the_variance_svcca_is_cca_as_scikit_learn_has_it() -> None:
    streams = similar_streams(n_layers=2, d_model=4, n_tokens=400)
    x, y = streams.numpy()
    u, v = CCA(n_components=4, scale=False, max_iter=10_000, tol=1e-12).fit_transform(x, y)
    correlations = [np.corrcoef(u[:, i], v[:, i])[0, 1] for i in range(4)]
    distances = SVCCADistances(range(2), variance=1.0)
    distances.update(streams)
    assert distances.result().matrix[0, 1] == pytest.approx(1 - np.mean(correlations), abs=1e-6)


@given(seeds)
@settings(deadline=None, max_examples=20)
def test_with_all_of_the_variance_no_invertible_map_is_seen(seed: int) -> None:
    streams = similar_streams(n_tokens=300, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.linalg.qr(
        torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    ).Q
    mapped = streams @ left @ torch.diag(torch.logspace(-1, 1, 8).double()) @ right + 5
    matrices = []
    for each in (streams, mapped):
        distances = SVCCADistances(range(4), variance=1.0)
        distances.update(each)
        matrices.append(distances.result().matrix)
    np.testing.assert_allclose(matrices[0], matrices[1], rtol=0, atol=1e-8)


@pytest.mark.parametrize("calls", [1, 3, 10])
def test_chunks_and_calls_do_not_show_in_svcca(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = similar_streams()
    whole = measure(SVCCADistances, streams).matrix
    monkeypatch.setattr("groupsae.grouping.similarity.CHUNK_NUMBERS", 13 * 4 * 8)
    parts = measure(SVCCADistances, streams, calls)
    assert parts.tokens == 1000
    np.testing.assert_allclose(parts.matrix, whole, rtol=0, atol=1e-11)


def test_dimensions_without_variance_count_for_nothing() -> None:
    """A layer that lies in a subspace, and one that is constant."""
    streams = similar_streams(n_layers=2, d_model=4)
    wider = torch.cat([streams, torch.ones(2, 1000, 3, dtype=torch.float64)], dim=2)
    for variance in (0.99, 1.0):
        matrices = []
        for each in (streams, wider):
            distances = SVCCADistances(range(2), variance=variance)
            distances.update(each)
            matrices.append(distances.result().matrix)
        np.testing.assert_allclose(*matrices, rtol=0, atol=1e-9)
    wider[1] = 0
    assert measure(SVCCADistances, wider).matrix[0, 1] == 1
    assert measure(CKADistances, wider).matrix[0, 1] == 1


def test_too_few_tokens_for_svcca_are_refused() -> None:
    """8 + 8 directions in a space of 15 dimensions must share one; in one of 16 they need not."""
    streams = torch.randn(2, 17, 8, generator=torch.Generator().manual_seed(0)).double()
    for n_tokens, enough in ((16, False), (17, True)):
        distances = SVCCADistances(range(2), variance=1.0)
        distances.update(streams[:, :n_tokens])
        if enough:
            assert distances.result().matrix[0, 1] > 0
        else:
            with pytest.raises(InputError, match="16 are too few for SVCCA: two layers have 16"):
                distances.result()


# Both.


@pytest.mark.parametrize("kind", OTHERS)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(50, 600), seeds)
@settings(deadline=None, max_examples=25)
def test_they_are_distances(
    kind: type[CKADistances | SVCCADistances],
    n_layers: int,
    d_model: int,
    n_tokens: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    streams = torch.randn(n_layers, n_tokens, d_model, generator=generator)
    streams[-1] = streams[0] * 2  # the same but for scale
    matrix = measure(kind, streams, calls=2).matrix
    assert ((matrix >= 0) & (matrix <= 1)).all()
    assert not np.diagonal(matrix).any()
    np.testing.assert_array_equal(matrix, matrix.T)
    assert matrix[0, -1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_centre_is_no_matter(kind: type[CKADistances | SVCCADistances]) -> None:
    streams = similar_streams()
    for center in (streams.mean(1), torch.ones(4, 8)):
        distances = kind(range(4), center)
        distances.update(streams)
        matrix = distances.result().matrix
        np.testing.assert_allclose(matrix, measure(kind, streams).matrix, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", OTHERS)
def test_permuting_the_layers_permutes_the_matrix(
    kind: type[CKADistances | SVCCADistances],
) -> None:
    streams = similar_streams()
    order = [3, 0, 1, 2]
    expected = measure(kind, streams).matrix[np.ix_(order, order)]
    np.testing.assert_allclose(measure(kind, streams[order]).matrix, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", DISTANCES)
def test_the_result_says_what_it_is(name: str) -> None:
    result = measure(DISTANCES[name], similar_streams())
    assert result.similarity == name
    assert result.center == (name != "angular")


@pytest.mark.parametrize("kind", OTHERS)
def test_sick_activations_other_layers_and_no_tokens_are_refused(
    kind: type[CKADistances | SVCCADistances],
) -> None:
    distances = kind([2, 3, 5, 9])
    with pytest.raises(InputError, match="no token was measured"):
        distances.result()
    with pytest.raises(InputError, match="3 residual streams for layers 2-3, 5, 9"):
        distances.update(similar_streams(n_layers=3))
    distances.update(similar_streams())
    before = distances.result().matrix
    for n_tokens in (10, 1000):
        sick = similar_streams(n_tokens=n_tokens)
        sick[2, 7, 3] = math.nan
        with pytest.raises(InputError, match=r"layers 5 hold a NaN or an infinity"):
            distances.update(sick)
    np.testing.assert_array_equal(distances.result().matrix, before)


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_kept_does_not_grow_with_the_tokens(
    kind: type[CKADistances | SVCCADistances],
) -> None:
    distances = kind(range(4))
    sizes = []
    for _ in range(3):
        distances.update(similar_streams())
        values = [*vars(distances).values(), *vars(getattr(distances, "_sums", distances)).values()]
        values += [each for value in values if isinstance(value, list) for each in value]
        sizes.append(sum(value.numel() for value in values if isinstance(value, Tensor)))
    assert sizes[0] == sizes[1] == sizes[2] > 0
