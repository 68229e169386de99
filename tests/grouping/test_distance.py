from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from groupsae.errors import InputError
from groupsae.grouping.distance import AngularDistances, LayerMoments
from groupsae.grouping.matrix import Distances
from tests.grouping.matrices import seeds


def similar_streams(
    n_layers: int = 5, n_tokens: int = 300, d_model: int = 16, seed: int = 0
) -> Tensor:
    """Like a residual stream: each layer adds something to the one before and grows."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(n_layers, n_tokens, d_model, generator=generator)
    growth = torch.arange(1, n_layers + 1)[:, None, None]
    return (steps.cumsum(0) + 0.7) * growth


def measure(
    streams: Tensor, context: Tensor | None = None, center: Tensor | None = None, calls: int = 1
) -> Distances:
    distances = AngularDistances(range(len(streams)), center)
    n_tokens = streams.shape[1]
    for part in torch.arange(n_tokens).tensor_split(calls):
        distances.update(streams[:, part], None if context is None else context[part])
    return distances.result()


def test_distances_are_those_of_the_definition() -> None:
    """One pair and one token at a time, in float64 with numpy alone."""
    streams = similar_streams()
    distances = measure(streams)
    vectors = streams.numpy().astype(np.float64)
    for p in range(5):
        for q in range(5):
            angles = [
                math.acos(np.clip(x @ y / np.linalg.norm(x) / np.linalg.norm(y), -1, 1)) / math.pi
                for x, y in zip(vectors[p], vectors[q], strict=True)
            ]
            expected = 0.0 if p == q else np.mean(angles)
            assert distances.matrix[p, q] == pytest.approx(expected, abs=1e-13)
    assert (distances.layers, distances.tokens, distances.center) == (tuple(range(5)), 300, False)


# The largest error of a token's distance that the documentation of AngularDistances promises.
@pytest.mark.parametrize(
    ("distance", "error"),
    [
        (0.0, 2e-8),
        (1e-4, 1e-11),
        (1e-2, 1e-13),
        (0.1, 1e-14),
        (0.5, 1e-15),
        (0.9, 1e-14),
        (0.9999, 1e-11),
        (1.0, 2e-8),
    ],
)
def test_near_and_far_vectors_are_measured_exactly(distance: float, error: float) -> None:
    """Against a formula that is exact at all angles, in extended precision."""
    generator = np.random.default_rng(0)
    u, v = generator.normal(size=(2, 200, 768))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    v -= (u * v).sum(1, keepdims=True) * u
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    angle = math.pi * distance
    pair = np.stack([5 * u, 3 * (math.cos(angle) * u + math.sin(angle) * v)]).astype(np.float32)

    x, y = pair.astype(np.longdouble)
    x /= np.sqrt((x * x).sum(1, keepdims=True))
    y /= np.sqrt((y * y).sum(1, keepdims=True))
    chord, sum_ = np.sqrt(((x - y) ** 2).sum(1)), np.sqrt(((x + y) ** 2).sum(1))
    expected = (2 * np.arctan2(chord, sum_) / np.pi).astype(np.float64)
    for token in range(200):
        measured = measure(torch.from_numpy(pair[:, token : token + 1])).matrix[0, 1]
        assert measured == pytest.approx(expected[token], abs=error, rel=0)


@given(st.integers(1, 5), st.integers(1, 20), st.integers(1, 6), seeds)
@settings(deadline=None, max_examples=40)
def test_distances_are_a_metric_between_0_and_1(
    n_layers: int, n_tokens: int, d_model: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = measure(torch.randn(n_layers, n_tokens, d_model, generator=generator)).matrix
    assert ((matrix >= 0) & (matrix <= 1)).all()
    assert not np.diagonal(matrix).any()
    np.testing.assert_array_equal(matrix, matrix.T)
    through = matrix[:, :, None] + matrix[None, :, :]  # from p to r by way of q
    assert (matrix[:, None, :] <= through + 1e-7).all()


@given(seeds, st.integers(1, 7))
@settings(deadline=None, max_examples=30)
def test_distances_do_not_depend_on_scale_order_rotation_or_batches(seed: int, calls: int) -> None:
    streams = similar_streams(n_tokens=40, d_model=6, seed=seed).double()
    matrix = measure(streams).matrix
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(5, 40, 1, generator=generator) * 100 + 1e-3
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator).double()).Q
    order = torch.randperm(40, generator=generator)
    for same in (streams * scales, streams @ rotation, streams[:, order]):
        np.testing.assert_allclose(measure(same).matrix, matrix, rtol=0, atol=1e-12)
    np.testing.assert_allclose(measure(streams, calls=calls).matrix, matrix, rtol=0, atol=1e-12)


def test_permuting_the_layers_permutes_the_matrix() -> None:
    streams = similar_streams()
    order = [3, 0, 4, 1, 2]
    expected = measure(streams).matrix[np.ix_(order, order)]
    np.testing.assert_allclose(measure(streams[order]).matrix, expected, rtol=0, atol=1e-14)


def test_subtracting_the_centre_is_measuring_centred_data() -> None:
    streams = similar_streams().double()
    moments = LayerMoments(range(5))
    moments.update(streams)
    mean = moments.result().mean
    centered = measure(streams, center=mean)
    by_hand = measure(streams - streams.mean(1, keepdim=True))
    np.testing.assert_allclose(centered.matrix, by_hand.matrix, rtol=0, atol=1e-13)
    assert (centered.center, by_hand.center) == (True, False)
    assert np.abs(centered.matrix - measure(streams).matrix).max() > 0.01


def test_known_angles() -> None:
    streams = torch.tensor([[[1.0, 0.0]], [[0.0, 3.0]], [[-2.0, 0.0]], [[5.0, 5.0]]])
    expected = [[0, 0.5, 1, 0.25], [0.5, 0, 0.5, 0.25], [1, 0.5, 0, 0.75], [0.25, 0.25, 0.75, 0]]
    np.testing.assert_allclose(measure(streams).matrix, expected, rtol=0, atol=1e-8)


def test_a_zero_vector_is_orthogonal_to_all() -> None:
    streams = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]], [[0.0, 0.0]]])
    matrix = measure(streams).matrix
    np.testing.assert_allclose(matrix, 0.5 - 0.5 * np.eye(3), rtol=0, atol=1e-15)


def test_tiny_vectors_have_a_direction() -> None:
    streams = torch.tensor([[[1e-30, 0.0]], [[1e-30, 1e-30]]])
    assert measure(streams).matrix[0, 1] == pytest.approx(0.25, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_is_measured_as_it_is(dtype: torch.dtype) -> None:
    streams = similar_streams().to(dtype)
    np.testing.assert_array_equal(measure(streams).matrix, measure(streams.double()).matrix)


def test_the_standard_error_is_that_of_independent_contexts() -> None:
    """Against the ratio estimator's formula over contexts of unequal length, with numpy alone."""
    streams = similar_streams(n_tokens=200)
    context = torch.randint(0, 23, (200,), generator=torch.Generator().manual_seed(1)).sort().values
    distances = measure(streams, context)
    vectors = streams[[0, 3]].numpy().astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    angles = np.arccos((vectors[0] * vectors[1]).sum(-1)) / np.pi
    members = [context.numpy() == c for c in np.unique(context)]
    residuals = [(angles[m] - angles.mean()).sum() for m in members]
    correction = len(members) / (len(members) - 1)
    expected = math.sqrt(correction * np.square(residuals).sum()) / 200
    assert distances.standard_error is not None
    assert distances.standard_error[0, 3] == pytest.approx(expected, rel=1e-9)
    assert distances.standard_error[3, 0] == distances.standard_error[0, 3]
    assert not np.diagonal(distances.standard_error).any()


def test_without_contexts_tokens_are_independent() -> None:
    streams = similar_streams(n_tokens=50)
    alone, numbered = measure(streams), measure(streams, torch.arange(50))
    assert alone.standard_error is not None
    assert numbered.standard_error is not None
    np.testing.assert_allclose(alone.standard_error, numbered.standard_error, rtol=1e-9)


def test_the_numbers_of_contexts_mean_nothing_in_the_next_call() -> None:
    streams = similar_streams(n_tokens=60)
    own = measure(streams, torch.arange(60) // 10)
    again = measure(streams, torch.arange(60) % 30 // 10 + 7, calls=2)
    assert own.standard_error is not None
    assert again.standard_error is not None
    np.testing.assert_allclose(again.standard_error, own.standard_error, rtol=1e-9)
    np.testing.assert_allclose(again.matrix, own.matrix, rtol=0, atol=1e-14)


def test_the_standard_error_covers_the_spread_of_repeated_measurements() -> None:
    """Correlated tokens of known variance: Var(mean) = s_context^2 / C + s_token^2 / N."""
    generator = torch.Generator().manual_seed(0)
    contexts, length, s_context, s_token = 2000, 25, 0.05, 0.1
    shared = s_context * torch.randn(contexts, 1, generator=generator)
    own = s_token * torch.randn(contexts, length, generator=generator)
    angle = math.pi * (0.5 + shared + own).flatten().double()
    fixed = torch.tensor([1.0, 0.0]).double().expand(len(angle), 2)
    streams = torch.stack([fixed, torch.stack([angle.cos(), angle.sin()], -1)])

    clustered = measure(streams, torch.arange(contexts).repeat_interleave(length)).standard_error
    naive = measure(streams).standard_error
    assert clustered is not None
    assert naive is not None
    true = math.sqrt(s_context**2 / contexts + s_token**2 / len(angle))
    assert clustered[0, 1] == pytest.approx(true, rel=0.06)  # its own spread is 1 / sqrt(2 C)
    assert naive[0, 1] < 0.5 * true


def test_one_context_alone_has_no_standard_error() -> None:
    assert measure(similar_streams(), torch.zeros(300, dtype=torch.long)).standard_error is None
    assert measure(similar_streams(n_tokens=1)).standard_error is None


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = similar_streams()
    context = torch.arange(300) // 7
    whole = measure(streams, context)
    monkeypatch.setattr("groupsae.grouping.distance.CHUNK_NUMBERS", {"cpu": 13 * 5 * (5 + 16)})
    parts = measure(streams, context)
    np.testing.assert_allclose(parts.matrix, whole.matrix, rtol=0, atol=1e-14)
    assert parts.standard_error is not None
    assert whole.standard_error is not None
    np.testing.assert_allclose(parts.standard_error, whole.standard_error, rtol=1e-9)


def test_what_is_kept_does_not_grow_with_the_tokens() -> None:
    def kept(measurer: AngularDistances | LayerMoments) -> int:
        values = [*vars(measurer).values()]
        values += [x for value in values for x in getattr(value, "__dict__", {}).values()]
        return sum(value.numel() for value in values if isinstance(value, Tensor))

    distances, moments = AngularDistances(range(5)), LayerMoments(range(5))
    sizes = []
    for _ in range(3):
        distances.update(similar_streams(), torch.arange(300) // 10)
        moments.update(similar_streams())
        sizes.append((kept(distances), kept(moments)))
    assert sizes[0] == sizes[1] == sizes[2]
    assert sizes[0][0] >= 10
    assert sizes[0][1] >= 5 * 16


def test_moments_are_exact_means() -> None:
    streams = similar_streams(n_tokens=1000) + 1000  # a large offset, where float32 sums drift
    center = torch.full((5, 16), 1000.0)
    moments = LayerMoments([0, 1, 2, 5, 9], center)
    for part in streams.split(300, dim=1):
        moments.update(part)
    result = moments.result()
    vectors = streams.numpy().astype(np.float64)
    np.testing.assert_allclose(result.mean.numpy(), vectors.mean(1), rtol=1e-14)
    norms = np.linalg.norm(vectors, axis=-1)
    np.testing.assert_allclose(result.mean_norm.numpy(), norms.mean(1), rtol=1e-14)
    centered_norms = np.linalg.norm(vectors - 1000, axis=-1)
    assert result.mean_centered_norm is not None
    np.testing.assert_allclose(
        result.mean_centered_norm.numpy(), centered_norms.mean(1), rtol=1e-13
    )
    assert (result.layers, result.tokens) == ((0, 1, 2, 5, 9), 1000)
    assert LayerMoments([0]).center is None


def test_without_a_centre_there_is_no_centred_norm() -> None:
    moments = LayerMoments(range(5))
    moments.update(similar_streams())
    assert moments.result().mean_centered_norm is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("measurer", [AngularDistances, LayerMoments])
def test_sick_activations_are_refused_by_layer(
    measurer: type[AngularDistances | LayerMoments], value: float
) -> None:
    measured = measurer([2, 3, 4, 5, 9])
    measured.update(similar_streams())
    sick = similar_streams()
    sick[3, 100, 7] = value
    sick[4, 5, 0] = value
    with pytest.raises(InputError, match=r"layers 5, 9 hold a NaN or an infinity; .* float32"):
        measured.update(sick)
    assert measured.result().tokens == 300


@pytest.mark.parametrize("measurer", [AngularDistances, LayerMoments])
def test_no_tokens_and_other_layers_are_refused(
    measurer: type[AngularDistances | LayerMoments],
) -> None:
    measured = measurer(range(5))
    with pytest.raises(InputError, match="no token was measured"):
        measured.result()
    measured.update(similar_streams(n_tokens=0))
    with pytest.raises(InputError, match="no token was measured"):
        measured.result()
    with pytest.raises(InputError, match="4 residual streams for layers 0-4"):
        measured.update(similar_streams(n_layers=4))
