"""Which tokens of a sequence a masked language model has to guess, and what it sees in their place.

Shape legend: L tokens of a sequence, N targets, V vocabulary.
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


class MaskedSequence(NamedTuple):
    """A sequence with its targets."""

    input_ids: np.ndarray  # [L] int64, what the model sees
    target_index: np.ndarray  # [N] int64 into L, ascending
    targets: np.ndarray  # [N] int64, the original tokens


def mask_sequence(
    ids: np.ndarray, *, config: MaskingConfig, seed: int, epoch: int, index: int, vocabulary: Vocabulary
) -> MaskedSequence:
    """Choose and hide the targets of one sequence.

    The choice is a function of `(seed, epoch, index)`, whatever batch or rank the sequence is in. Of the M
    tokens that aren't [CLS], [SEP] or [PAD], exactly `max(1, round(rate * M))` are targets (none if M is 0).
    With `whole_word` whole words are taken until there are at least as many.

    Args:
        ids: `[L]` integer, with its special tokens.
        seed: from 0 to 2**64 - 1.
        epoch: the pass over the data, so that every pass masks differently.
        index: the sequence's row in the dataset.
    """
    input_ids = ids.astype(np.int64)
    special = vocabulary.special
    candidates = ((ids != special.cls) & (ids != special.sep) & (ids != special.pad)).nonzero()[0]
    if not len(candidates):
        return MaskedSequence(input_ids, candidates, candidates)
    rng = random_numbers(seed, epoch, (index, 0))
    count = max(1, round(config.rate * len(candidates)))
    if config.whole_word:
        chosen = _whole_words(candidates, vocabulary.continuation[input_ids[candidates]], count, rng)
    else:
        chosen = candidates[rng.random(len(candidates)).argsort()[:count]]
    chosen.sort()
    targets = input_ids[chosen]
    fate = rng.random(len(chosen))
    input_ids[chosen[fate < config.mask_share]] = special.mask
    randomised = chosen[(fate >= config.mask_share) & (fate < config.mask_share + config.random_share)]
    if len(randomised):
        input_ids[randomised] = _random_tokens(len(randomised), vocabulary, rng)
    return MaskedSequence(input_ids, chosen, targets)


def random_numbers(seed: int, epoch: int, stream: tuple[int, int]) -> np.random.Generator:
    """Random numbers that depend on the arguments alone; streams don't overlap. All are below 2**64."""
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([0, 0, *stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _whole_words(
    candidates: np.ndarray, continues: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Positions of random words, as few as hold `count` tokens. A word ends where a special token stands."""
    starts = ~continues
    starts[0] = True
    starts[1:] |= np.diff(candidates) > 1
    word = starts.cumsum() - 1  # of each candidate
    lengths = np.bincount(word)
    order = rng.permutation(len(lengths))
    taken = int(np.searchsorted(lengths[order].cumsum(), count)) + 1
    return candidates[np.isin(word, order[:taken])]


def _random_tokens(count: int, vocabulary: Vocabulary, rng: np.random.Generator) -> np.ndarray:
    """Uniform over the ids that aren't special: drawn from a shorter range, then moved past each of those."""
    specials = sorted({i for i in vocabulary.special if i is not None})
    tokens = rng.integers(0, vocabulary.size - len(specials), count)
    for special in specials:
        tokens += tokens >= special
    return tokens
