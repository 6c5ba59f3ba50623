"""Casts to the type of a checkpoint: NumPy's and torch's agree, and what float16 cannot hold is refused."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquilamoe.checkpoint.dtypes import cast, encode, torch_dtype
from aquilamoe.config.messages import UserError

NUMBERS = st.floats(-60000, 60000, width=32) | st.sampled_from(
    [0.0, -0.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 1e-40, 65504.0]
)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@settings(derandomize=True, deadline=None, max_examples=50)
@given(numbers=st.lists(NUMBERS, min_size=1, max_size=20))
def test_arrays_and_tensors_become_the_same_bytes(dtype: str, numbers: list[float]) -> None:
    array = np.array(numbers, np.float32)
    tensor = cast(torch.from_numpy(array), torch_dtype(dtype), "x")
    assert encode(array, dtype, "x").tobytes() == tensor.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("value", [70000.0, -65520.0])
def test_a_number_beyond_float16_is_refused_with_tensor_and_value(value: float) -> None:
    array = np.array([[1.0, value]], np.float32)
    message = rf"tensor 'a\.weight': one of its weights becomes {re.escape(f'{value:.6g}')}, float16 ends at 65504; "
    with pytest.raises(UserError, match=message):
        encode(array, "F16", "a.weight")
    with pytest.raises(UserError, match=message):
        cast(torch.from_numpy(array), torch.float16, "a.weight")


def test_what_is_no_number_stays_what_it_is() -> None:
    array = np.array([np.inf, np.nan, 1.0])
    assert np.isinf(encode(array, "F16", "x")[0])
    assert cast(torch.from_numpy(array), torch.float16, "x").isfinite().tolist() == [False, False, True]
