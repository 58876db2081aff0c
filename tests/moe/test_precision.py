"""Which dtype operators are given."""

import torch

from moe.precision import in_autocast, in_float32


def test_autocasts_dtype_where_it_is_on() -> None:
    x = torch.ones(2)
    assert in_autocast(x) is x
    with torch.autocast("cpu", torch.bfloat16):
        assert in_autocast(x).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert in_autocast(x) is x


def test_half_precision_is_widened_and_wider_numbers_are_left_alone() -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    wide = in_float32(*(torch.ones(1, dtype=dtype) for dtype in dtypes))
    assert [x.dtype for x in wide] == [torch.float32, torch.float32, torch.float32, torch.float64]
