"""Which tokens a masked language model has to guess, and what it sees in their place.

Shape legend: B sequences, packed end to end; T tokens, M of them maskable, N targets; W words, V vocabulary.
"""

from typing import Annotated, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from routing.config import Config
from training.data.tokenizer import Vocabulary

Share = Annotated[float, Field(ge=0, le=1)]


class MaskingConfig(Config):
    """Masking after BERT (Devlin et al. 2019, section 3.1).

    `rate` of a sequence's tokens are targets. Of these `mask_share` appear as the mask token, `random_share`
    as a random token, and the rest as themselves.
    """

    rate: Annotated[float, Field(gt=0, lt=1)] = 0.2
    mask_share: Share = 0.8
    random_share: Share = 0.1
    whole_word: bool = False

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if self.mask_share + self.random_share > 1 + 1e-9:
            raise ValueError(
                f"mask_share {self.mask_share:g} + random_share {self.random_share:g} is more than 1; the "
                "rest of the targets is left as it is, so together they may be 1 at most"
            )
        return self


class Masked(NamedTuple):
    """Packed sequences with their targets."""

    input_ids: np.ndarray  # [T] int64, what the model sees
    target_index: np.ndarray  # [N] int64 into T, ascending
    targets: np.ndarray  # [N] int64, the original tokens


def mask_tokens(
    ids: np.ndarray,
    lengths: np.ndarray,
    *,
    config: MaskingConfig,
    seed: int,
    epochs: np.ndarray,
    indices: np.ndarray,
    vocabulary: Vocabulary,
) -> Masked:
    """Choose and hide the targets of packed sequences.

    A sequence's masks depend on its `(seed, epoch, index)` and tokens alone, whatever it is packed with.
    Of its m tokens that aren't [CLS], [SEP] or [PAD], exactly `max(1, round(rate * m))` are targets (none if
    m is 0). With `whole_word` random words are taken until there are at least as many.

    Args:
        ids: `[T]` integer, the sequences end to end, with their special tokens.
        lengths: `[B]` integer, tokens of each sequence.
        seed: from 0 to 2**64 - 1.
        epochs: `[B]` integer, the pass over the data, so that every pass masks differently.
        indices: `[B]` integer, each sequence's row in the dataset.
    """
    input_ids = ids.astype(np.int64)
    maskable = np.flatnonzero(~np.isin(input_ids, vocabulary.special.never_targets))
    sequence_t = np.repeat(np.arange(len(lengths)), lengths)
    position_t = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    key = _mix(_mix(_mix(_uint64([seed])) + _uint64(epochs)) + _uint64(indices))
    sequence, key_m, position = sequence_t[maskable], key[sequence_t[maskable]], position_t[maskable]

    if config.whole_word:
        starts = ~vocabulary.continuation[input_ids[maskable]]
        starts[1:] |= (np.diff(maskable) > 1) | (np.diff(sequence) > 0)
        starts[:1] = True
    else:
        starts = np.ones(len(maskable), dtype=bool)  # every token is a word of its own
    chosen = _choose_words(starts, sequence, _random(key_m, position, 0), len(lengths), config.rate)

    target_index = maskable[chosen]
    targets = input_ids[target_index]
    fate = _random(key_m[chosen], position[chosen], 1) / 2.0**64
    replacement = _ordinary_tokens(_random(key_m[chosen], position[chosen], 2), vocabulary)
    input_ids[target_index] = np.where(
        fate < config.mask_share,
        vocabulary.special.mask,
        np.where(fate < config.mask_share + config.random_share, replacement, targets),
    )
    return Masked(input_ids, target_index, targets)


def _choose_words(
    starts: np.ndarray, sequence: np.ndarray, random: np.ndarray, sequences: int, rate: float
) -> np.ndarray:
    """Take each sequence's words in random order until they hold its share of the tokens: `[M]` bool.

    Args:
        starts: `[M]` bool, where a word starts.
        sequence: `[M]` the sequence of each token.
        random: `[M]` the order of the words is that of their first tokens' numbers.
    """
    tokens = np.bincount(sequence, minlength=sequences)
    wanted = np.maximum(1, np.rint(rate * tokens))
    first = np.flatnonzero(starts)
    order = np.lexsort((random[first], sequence[first]))
    size = np.diff(first, append=len(starts))[order]
    owner = sequence[first][order]
    before = np.cumsum(size) - size - (np.cumsum(tokens) - tokens)[owner]  # tokens taken ahead of the word
    taken = np.empty(len(first), dtype=bool)
    taken[order] = before < wanted[owner]
    return taken[np.cumsum(starts) - 1]


def _ordinary_tokens(random: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Uniform over the ids that aren't special: from a shorter range, then moved past each special one."""
    specials = sorted({i for i in vocabulary.special if i is not None})
    tokens = (random % np.uint64(vocabulary.size - len(specials))).astype(np.int64)
    for special in specials:
        tokens += tokens >= special
    return tokens


def _random(key: np.ndarray, position: np.ndarray, purpose: int) -> np.ndarray:
    """Uniform uint64 numbers, one per token and purpose (of three).

    Element `3 * position + purpose` of SplitMix64 (Steele, Lea and Flood 2014, figure 16) started at `key`:
    unlike a generator with a state, it serves the tokens of many sequences in one call.
    """
    return _mix(key + _uint64(3 * position + purpose + 1) * np.uint64(0x9E3779B97F4A7C15))


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's bijection of uint64, which flips about half of the bits for any change."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uint64(values: np.ndarray | list[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.uint64)
