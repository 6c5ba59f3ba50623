"""The random numbers of growth: their distribution, their streams, and that they are what they were."""

import numpy as np
import pytest

from aquilamoe.growth import rng

NORMAL = [-0.98941715977016, -1.394629989164692, -1.168525869843557]
ORDER = [1, 5, 4, 0, 2, 3, 7, 6]


def test_a_million_of_them_are_normal_by_mean_variance_and_tails() -> None:
    drawn = rng.normal((1000, 1000), rng.stream(0, "x"), np.float64)
    assert abs(drawn.mean()) < 0.003
    assert drawn.var() == pytest.approx(1, abs=0.005)
    assert (drawn**4).mean() == pytest.approx(3, abs=0.03)
    assert (np.abs(drawn) > 3).mean() == pytest.approx(0.0027, rel=0.1)
    neighbours = (drawn[:, 1:] * drawn[:, :-1]).mean(), (drawn[1:] * drawn[:-1]).mean()
    assert max(map(abs, neighbours)) < 0.005


def test_float32_has_the_numbers_of_float64() -> None:
    single, double = (rng.normal((5, 7), rng.stream(3, "x"), kind) for kind in (np.float32, np.float64))
    assert single.dtype == np.float32
    assert np.array_equal(single, double.astype(np.float32))


def test_a_stream_belongs_to_a_seed_and_a_name() -> None:
    def first(seed: int, name: str) -> list[float]:
        return list(rng.normal((8,), rng.stream(seed, name)))

    assert first(0, "x") == first(0, "x")
    assert first(0, "x") != first(1, "x")
    assert first(0, "x") != first(0, "y")


def test_they_are_what_they_were() -> None:
    """Golden values: when they change, a growth made again has other weights, and versions of stages must be raised."""
    assert rng.normal((3,), rng.stream(0, "x"), np.float64) == pytest.approx(NORMAL, abs=1e-12)
    assert list(rng.permutation(8, rng.stream(0, "x"))) == ORDER


def test_a_permutation_has_every_number_once() -> None:
    assert sorted(rng.permutation(1000, rng.stream(1, "x"))) == list(range(1000))


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5)])
def test_the_shorter_side_of_an_orthogonal_matrix_is_at_right_angles(shape: tuple[int, int]) -> None:
    drawn = rng.orthogonal(*shape, rng.stream(0, "x"))
    assert drawn.shape == shape
    square = drawn @ drawn.T if shape[0] <= shape[1] else drawn.T @ drawn
    np.testing.assert_allclose(square, max(shape) * np.eye(min(shape)), atol=1e-12)


def test_orthogonal_matrices_point_everywhere() -> None:
    """A decomposition alone would leave signs to chance of an algorithm."""
    firsts = [rng.orthogonal(3, 6, rng.stream(seed, "x"))[0, 0] for seed in range(200)]
    assert 70 < sum(first > 0 for first in firsts) < 130
