"""What a sample of tokens says across layers: flows, paths, agreement, churn. Pure. N sampled tokens, R routers."""

from collections import Counter
from itertools import pairwise

import numpy as np

from training.inspection.figures import matrix
from training.inspection.sample import Sampled
from training.inspection.schema import Agreement, Drift, Flow, Paths, PointRouter, Way
from training.inspection.words import entropy, rounded

TOP_PATHS = 20


def flows(routers: dict[str, int], sample: Sampled) -> list[Flow]:
    """From each layer's best choice to that of the next layer with a router of the same kind.

    Args:
        routers: how many choices each has, in the order of `sample.best`'s columns.
    """
    found = []
    for members in _kinds(routers).values():
        for source, target in pairwise(members):
            shape = (routers[source], routers[target])
            counted = _joint(sample, list(routers).index(source), list(routers).index(target), shape)
            found.append(Flow(source=source, target=target, share=matrix(counted / max(len(sample.ids), 1))))
    return found


def paths(routers: dict[str, int], sample: Sampled, texts: list[str]) -> list[Paths]:
    """The most frequent ways through all layers with routers of one kind; none of kinds in a single layer."""
    found = []
    for kind, members in _kinds(routers).items():
        if len(members) < 2:
            continue
        columns = [list(routers).index(name) for name in members]
        ways, way_of, counts = np.unique(sample.best[:, columns], axis=0, return_inverse=True, return_counts=True)
        whole = np.all(ways >= 0, axis=1)  # a token that no choice takes at a layer goes no way there
        order = [int(way) for way in np.argsort(-counts, kind="stable") if whole[way]][:TOP_PATHS]
        found.append(
            Paths(
                routes=kind,
                routers=members,
                tokens=len(sample.ids),
                distinct=int(whole.sum()),
                top=[
                    Way(
                        choices=ways[way].tolist(),
                        share=rounded(counts[way] / len(sample.ids)),
                        count=int(counts[way]),
                        tokens=_frequent(sample.ids[way_of.reshape(-1) == way], texts),
                    )
                    for way in order
                ],
            )
        )
    return found


def agreement(routers: dict[str, int], sample: Sampled) -> Agreement:
    """`I(A; B) / sqrt(H(A) H(B))` of any two routers' best choices (Strehl and Ghosh 2002).

    Of few tokens, what two unrelated routers seem to share is not zero but about (a - 1)(b - 1) / 2N, of a and b
    choices in use: entropies and information are corrected by it (Miller 1955), and nothing below 0 is told.
    """
    names = list(routers)
    return Agreement(
        routers=names,
        nmi=[
            [_nmi(_joint(sample, a, b, (routers[one], routers[other])), a == b) for b, other in enumerate(names)]
            for a, one in enumerate(names)
        ],
    )


def drift(before: PointRouter, after: PointRouter, then: np.ndarray, now: np.ndarray) -> Drift:
    """How a router changed, from its loads and from what the same tokens `[N]` chose best."""
    apart = np.abs(np.array(before.load) - np.array(after.load)).sum() / 2
    return Drift(total_variation=rounded(min(apart, 1.0)), churn=rounded((then != now).mean()) if len(now) else 0.0)


def _kinds(routers: dict[str, int]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in routers:
        found.setdefault(name.split(".")[1], []).append(name)
    return found


def _joint(sample: Sampled, a: int, b: int, shape: tuple[int, int]) -> np.ndarray:
    """Tokens by their best choices at two routers, `shape` int64; those without a choice at one aren't counted."""
    one, other = (sample.best[:, column].astype(np.int64) for column in (a, b))
    both = (one >= 0) & (other >= 0)
    return np.bincount(one[both] * shape[1] + other[both], minlength=shape[0] * shape[1]).reshape(shape)


def _nmi(joint: np.ndarray, same: bool) -> float | None:
    one, other = entropy(joint.sum(1)), entropy(joint.sum(0))
    if min(one, other) < 1e-3:
        return None
    if same:
        return 1.0
    n, used = joint.sum(), [int((joint.sum(axis) > 0).sum()) for axis in (0, 1)]
    plain = _plain(joint.sum(1)) + _plain(joint.sum(0)) - _plain(joint.reshape(-1))
    shared = max(0.0, plain - (used[0] - 1) * (used[1] - 1) / (2 * n))
    return rounded(min(1.0, shared / float(np.sqrt(one * other))))


def _plain(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _frequent(ids: np.ndarray, texts: list[str]) -> list[str]:
    """The five most frequent, ties by id."""
    return [texts[i] for i, _ in sorted(Counter(ids.tolist()).items(), key=lambda one: (-one[1], one[0]))[:5]]
