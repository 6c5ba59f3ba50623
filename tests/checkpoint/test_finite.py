"""Weights that are no numbers are found wherever they are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquilamoe.checkpoint.finite import PIECE, first_nonfinite, first_nonfinite_bytes

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@settings(derandomize=True, deadline=None, max_examples=120)
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    size=st.integers(0, 50),
    places=st.lists(st.integers(0, 49), max_size=3),
    value=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
)
def test_the_first_of_them_is_named(dtype: str, size: int, places: list[int], value: float) -> None:
    tensor = torch.randn(size).to(DTYPES[dtype])
    places = [place for place in places if place < size]
    tensor[places] = value
    expected = min(places, default=None)
    assert first_nonfinite(tensor) == expected
    assert first_nonfinite_bytes(tensor.view(torch.uint8).numpy().data, dtype) == expected


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_the_largest_and_smallest_numbers_are_numbers(dtype: str) -> None:
    info = torch.finfo(DTYPES[dtype])
    tensor = torch.tensor([info.max, info.min, info.tiny, -0.0, info.smallest_normal / 2], dtype=DTYPES[dtype])
    assert first_nonfinite(tensor) is None
    assert first_nonfinite_bytes(tensor.view(torch.uint8).numpy().data, dtype) is None


@pytest.mark.parametrize("place", [0, PIECE - 1, PIECE, 3 * PIECE + 6])
def test_long_tensors_are_searched_to_their_end(place: int) -> None:
    tensor = torch.zeros(3 * PIECE + 7, dtype=torch.bfloat16)
    tensor[place] = float("nan")
    assert first_nonfinite_bytes(tensor.view(torch.uint8).numpy().data, "BF16") == place


def test_the_index_is_that_of_the_flattened_tensor_however_it_lies_in_memory() -> None:
    tensor = torch.zeros(3, 4).t()
    tensor[2, 1] = float("inf")
    assert first_nonfinite(tensor) == 2 * 3 + 1
