import numpy as np

from training.tasks.alignment import first_pieces, token_targets, word_labels


def test_a_word_is_spoken_for_by_its_first_token() -> None:
    # [CLS] the rout ##er ##s . [SEP], words: the, (nothing), routers, ., (cut off)
    first = first_pieces([None, 0, 2, 2, 2, 3, None], words=5)
    assert first == [1, -1, 2, 5, -1]
    assert token_targets(first, [7, 8, 9, 6, 5], length=7) == [-100, 7, 9, -100, -100, 6, -100]


def test_words_without_a_token_are_answered_all_the_same() -> None:
    logits = np.array([[9, 0, 0], [0, 0, 1], [0, 2, 1], [9, 0, 0]])
    assert word_labels([1, -1, 2], logits, ("B-x", "I-x", "O")) == ["O", "O", "I-x"]
    assert word_labels([1, -1, 2], logits, ("ADJ", "NOUN", "VERB")) == ["VERB", "ADJ", "NOUN"]
    assert word_labels([-1], np.zeros((2, 2)), ("B-x", "O")) == ["O"]
