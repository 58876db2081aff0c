import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from training.data.masking import Masked, MaskingConfig, mask_tokens
from training.data.tokenizer import SpecialTokens, Vocabulary

PAD, UNK, CLS, SEP, MASK = range(5)
# Ids 5 to 19 start words, 20 to 29 continue them.
VOCABULARY = Vocabulary(30, SpecialTokens(PAD, UNK, CLS, SEP, MASK), np.arange(30) >= 20)


def mask(ids: list[int], *, seed: int = 0, epoch: int = 0, index: int = 0, **config) -> Masked:
    return mask_tokens(
        np.array(ids, dtype=np.int32),
        np.array([len(ids)]),
        config=MaskingConfig.model_validate(config),
        seed=seed,
        epochs=np.array([epoch]),
        indices=np.array([index]),
        vocabulary=VOCABULARY,
    )


def test_everything_masked() -> None:
    masked = mask([CLS, 7, 8, SEP], rate=0.99, mask_share=1, random_share=0)
    assert masked.input_ids.tolist() == [CLS, MASK, MASK, SEP]
    assert masked.target_index.tolist() == [1, 2]
    assert masked.targets.tolist() == [7, 8]
    assert {a.dtype for a in masked} == {np.dtype(np.int64)}


def test_kept_as_they_are() -> None:
    masked = mask([CLS, 7, 8, SEP], rate=0.99, mask_share=0, random_share=0)
    assert masked.input_ids.tolist() == [CLS, 7, 8, SEP]
    assert masked.targets.tolist() == [7, 8]


def test_nothing_to_mask() -> None:
    masked = mask([CLS, SEP, PAD])
    assert masked.input_ids.tolist() == [CLS, SEP, PAD]
    assert len(masked.target_index) == len(masked.targets) == 0


def test_random_replacements_are_all_the_ordinary_tokens() -> None:
    seen: set[int] = set()
    for index in range(50):
        seen |= set(mask([7] * 20, index=index, rate=0.9, mask_share=0, random_share=1).input_ids.tolist())
    assert seen == set(range(5, 30))


@pytest.mark.parametrize(("tokens", "expected"), [(1, 1), (2, 1), (10, 2), (126, 25)])
def test_the_count_is_exact(tokens: int, expected: int) -> None:
    assert len(mask([CLS, *[9] * tokens, SEP], rate=0.2).targets) == expected


def test_the_shares_hold_on_average() -> None:
    masked = [mask([9] * 200, index=index, rate=0.5) for index in range(100)]
    seen = np.concatenate([m.input_ids[m.target_index] for m in masked])
    assert abs((seen == MASK).mean() - 0.8) < 0.02
    assert abs((seen == 9).mean() - 0.1 - 0.1 / 25) < 0.02


def test_every_place_is_as_likely() -> None:
    counts = np.zeros(12)
    for index in range(2000):
        np.add.at(counts, mask([CLS, *[9] * 10, SEP], index=index, rate=0.3).target_index, 1)
    assert counts[[0, 11]].tolist() == [0, 0]
    assert np.all(np.abs(counts[1:11] / 2000 - 0.3) < 0.05)


def test_whole_words() -> None:
    # Words: (5 20 21), (6), (7 22), and after an inner [SEP] a continuation that starts one: (23 24).
    ids = [CLS, 5, 20, 21, 6, 7, 22, SEP, 23, 24, SEP]
    words = [{1, 2, 3}, {4}, {5, 6}, {8, 9}]
    seen = set()
    for index in range(100):
        chosen = set(mask(ids, index=index, rate=0.4, whole_word=True).target_index.tolist())
        taken = [word for word in words if word <= chosen]
        assert set().union(*taken) == chosen
        assert len(chosen) >= 3  # round(0.4 * 8)
        assert min(len(chosen - word) for word in taken) < 3
        seen |= {min(word) for word in taken}
    assert seen == {1, 4, 5, 8}


@given(
    st.lists(st.integers(0, 29), min_size=1, max_size=40),
    st.floats(0.01, 0.99),
    st.booleans(),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**40),
)
def test_a_mask_is_undone_by_its_targets(
    ids: list[int], rate: float, whole_word: bool, seed: int, epoch: int, index: int
) -> None:
    masked = mask(ids, seed=seed, epoch=epoch, index=index, rate=rate, whole_word=whole_word)
    again = mask(ids, seed=seed, epoch=epoch, index=index, rate=rate, whole_word=whole_word)
    assert all(np.array_equal(a, b) for a, b in zip(masked, again, strict=True))
    assert np.all(np.diff(masked.target_index) > 0)
    assert not np.isin(masked.targets, [PAD, CLS, SEP]).any()
    restored = masked.input_ids.copy()
    restored[masked.target_index] = masked.targets
    assert restored.tolist() == ids
    maskable = sum(i not in (PAD, CLS, SEP) for i in ids)
    count = max(1, round(rate * maskable)) if maskable else 0
    assert len(masked.targets) >= count if whole_word else len(masked.targets) == count


def test_seed_epoch_and_index_all_matter() -> None:
    ids = [CLS, *range(5, 30), SEP]
    masks = [mask(ids), mask(ids, seed=1), mask(ids, epoch=1), mask(ids, index=1)]
    masks += [mask(ids, seed=2**64 - 1), mask(ids, seed=2**64 - 2)]
    assert len({tuple(m.target_index.tolist()) for m in masks}) == 6


@pytest.mark.parametrize("config", [{"rate": 0}, {"rate": 1}, {"mask_share": 0.8, "random_share": 0.3}])
def test_impossible_rates(config: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        MaskingConfig.model_validate(config)


def test_shares_may_add_up_to_one() -> None:
    assert MaskingConfig(mask_share=0.7, random_share=0.3).rate == 0.2


@given(
    st.lists(st.lists(st.integers(0, 29), max_size=12), max_size=5),
    st.booleans(),
    st.integers(0, 2**64 - 1),
)
def test_packing_changes_no_mask(rows: list[list[int]], whole_word: bool, seed: int) -> None:
    packed = mask_tokens(
        np.array([i for ids in rows for i in ids], dtype=np.int32),
        np.array([len(ids) for ids in rows], dtype=np.int32),
        config=MaskingConfig(whole_word=whole_word),
        seed=seed,
        epochs=np.arange(len(rows)),
        indices=np.arange(len(rows)) + 7,
        vocabulary=VOCABULARY,
    )
    alone = [mask(ids, seed=seed, epoch=row, index=row + 7, whole_word=whole_word) for row, ids in enumerate(rows)]
    starts = np.cumsum([0, *map(len, rows)])
    assert packed.input_ids.tolist() == [i for m in alone for i in m.input_ids]
    assert packed.targets.tolist() == [i for m in alone for i in m.targets]
    expected = [i + start for m, start in zip(alone, starts[:-1], strict=True) for i in m.target_index]
    assert packed.target_index.tolist() == expected
