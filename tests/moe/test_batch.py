"""Packing and unpacking."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from moe.batch import PackedBatch, pack, pack_lengths, select, to_device, unpack
from tests.oracles import gradients


def as_lists(batch: PackedBatch) -> dict:
    return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in batch._asdict().items()}


def test_right_padding() -> None:
    assert as_lists(pack(torch.tensor([[1, 1, 1], [1, 0, 0]]))) == {
        "cu_seqlens": [0, 3, 4],
        "max_seqlen": 3,
        "positions": [0, 1, 2, 0],
        "token_index": [0, 1, 2, 3],
        "seq_index": [0, 1],
        "shape": (2, 3),
    }


def test_left_padding_holes_and_an_empty_row() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]])
    assert as_lists(pack(mask)) == {
        "cu_seqlens": [0, 2, 2, 4],
        "max_seqlen": 2,
        "positions": [0, 1, 0, 1],  # among the real tokens
        "token_index": [2, 3, 8, 10],
        "seq_index": [0, 1, 2],
        "shape": (3, 4),
    }


def test_dtypes_whatever_the_masks() -> None:
    mask = torch.tensor([[1, 0], [1, 1]])
    for dtype in (torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32):
        batch = pack(mask.to(dtype))
        assert as_lists(batch) == as_lists(pack(mask))
        dtypes = [f.dtype for f in batch if isinstance(f, Tensor)]
        assert dtypes == [torch.int32, torch.int64, torch.int64, torch.int64]


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)], ids=str)
def test_grids_without_tokens(shape: tuple[int, int]) -> None:
    batch = pack(torch.ones(shape))
    assert batch.cu_seqlens.tolist() == [0] * (shape[0] + 1)
    assert batch.max_seqlen == 0
    assert unpack(torch.zeros(0, 5), batch).shape == (*shape, 5)


@pytest.mark.parametrize(
    "mask", [[[1, 2]], [[0, -1]], [[0.0, -10_000.0]], [[0.5, 1.0]], [[float("nan"), 1.0]]], ids=str
)
def test_masks_of_other_values_are_refused(mask: list) -> None:
    with pytest.raises(ValueError, match="other than 0 and 1"):
        pack(torch.tensor(mask))


@pytest.mark.parametrize("shape", [(4,), (2, 1, 4)], ids=str)
def test_masks_of_other_ranks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[batch, length\]"):
        pack(torch.ones(shape))


def test_packed_lengths() -> None:
    assert as_lists(pack_lengths([2, 0, 3])) == {
        "cu_seqlens": [0, 2, 2, 5],
        "max_seqlen": 3,
        "positions": [0, 1, 0, 1, 2],
        "token_index": [0, 1, 6, 7, 8],
        "seq_index": [0, 1, 2],
        "shape": (3, 3),
    }


@given(st.lists(st.integers(0, 5), max_size=5))
def test_packed_lengths_are_a_right_padded_mask(lengths: list[int]) -> None:
    longest = max(lengths, default=0)
    mask = torch.tensor([[n < length for n in range(longest)] for length in lengths])
    mask = mask.reshape(len(lengths), longest).bool()
    assert as_lists(pack_lengths(lengths)) == as_lists(pack(mask))


@given(st.integers(0, 4), st.integers(0, 6), st.data())
def test_unpack_brings_every_token_back_and_zeros_elsewhere(rows: int, length: int, data: st.DataObject) -> None:
    bits = data.draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    mask = torch.tensor(bits, dtype=torch.bool).view(rows, length)
    grid = torch.arange(1.0, rows * length * 3 + 1).view(rows, length, 3)
    batch = pack(mask)
    packed = grid.flatten(0, 1)[batch.token_index]
    assert torch.equal(unpack(packed, batch), grid * mask[..., None])
    for b in range(rows):  # cu_seqlens and positions say the same
        start, end = batch.cu_seqlens[b : b + 2].tolist()
        assert torch.equal(packed[start:end], grid[b][mask[b]])
        assert batch.positions[start:end].tolist() == list(range(end - start))


def test_unpack_passes_gradients_of_real_tokens() -> None:
    batch, x, upstream = (
        pack(torch.tensor([[0, 1], [1, 1]])),
        torch.randn(3, 4, requires_grad=True),
        torch.randn(2, 2, 4),
    )
    assert_close(gradients(unpack(x, batch), {"x": x}, [upstream])["x"], upstream.flatten(0, 1)[1:])


def test_to_device_moves_all_tensors_and_nothing_else() -> None:
    moved = to_device(pack_lengths([2, 1]), torch.device("meta"))
    assert {f.device.type for f in moved if isinstance(f, Tensor)} == {"meta"}
    assert (moved.max_seqlen, moved.shape) == (2, (2, 2))


def test_select_literal() -> None:
    batch = pack(torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0]]))
    kept, rows = select(batch, [1, 2])
    assert as_lists(kept) == {
        "cu_seqlens": [0, 0, 2],
        "max_seqlen": 2,
        "positions": [0, 1],
        "token_index": [7, 8],
        "seq_index": [1, 2],
        "shape": (4, 3),
    }
    assert rows.tolist() == [2, 3]


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=8))
def test_selecting_sequences_is_packing_them_alone(sequences: list[tuple[int, bool]]) -> None:
    lengths = [length for length, _ in sequences]
    kept = [b for b, (_, stays) in enumerate(sequences) if stays]
    x = torch.arange(sum(lengths))
    batch, rows = select(pack_lengths(lengths), kept)
    alone = pack_lengths([lengths[b] for b in kept])
    for name in ("cu_seqlens", "positions", "max_seqlen"):
        assert as_lists(batch)[name] == as_lists(alone)[name]
    assert x[rows].tolist() == [t for b in kept for t in x.split(lengths)[b].tolist()]
    assert batch.seq_index.tolist() == kept
    # Selecting twice is selecting once: sequences that leave later are still known by their original rows.
    again, rows_again = select(batch, list(range(0, len(kept), 2)))
    once, rows_once = select(pack_lengths(lengths), kept[::2])
    assert as_lists(again) == as_lists(once)
    assert torch.equal(rows[rows_again], rows_once)
