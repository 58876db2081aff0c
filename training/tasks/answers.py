"""How SQuAD compares answers (Rajpurkar et al., arXiv 1606.05250, section 6.1; unanswerable ones: arXiv 1806.03822)."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(answer: str) -> str:
    """In lower case, without punctuation and articles, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 if the normalized answer is one of the right ones; without a right one, if it is empty."""
    return float(normalized(answer) in {normalized(one) for one in right or [""]})


def word_f1(answer: str, right: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of the normalized words, by the right answer that it favours."""
    return max(_f1(normalized(answer).split(), normalized(one).split()) for one in right or [""])


def _f1(words: list[str], right: list[str]) -> float:
    if not words or not right:
        return float(words == right)
    common = (Counter(words) & Counter(right)).total()
    return 2 * common / (len(words) + len(right))
