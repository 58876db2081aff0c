"""What a sample says across layers, against loops over stored routings."""

from collections import Counter
from math import sqrt

import numpy as np
import pytest

from tests.training.inspection.routings import entropy_of
from training.inspection.across import agreement, drift, flows, paths
from training.inspection.sample import Sampled
from training.inspection.schema import PointRouter

ROUTERS = {"0.heads": 3, "0.experts": 4, "1.experts": 4, "2.heads": 3, "2.experts": 4}
TEXTS = [f"word {i}" for i in range(10)]


def sample(seed: int, tokens: int = 300) -> Sampled:
    """Where layers agree by half, and some tokens take no expert in the last one."""
    generator = np.random.default_rng(seed)
    best = np.stack([generator.integers(0, choices, tokens) for choices in ROUTERS.values()], axis=1)
    best[:, 2] = np.where(generator.random(tokens) < 0.5, best[:, 1], best[:, 2])
    best[generator.random(tokens) < 0.1, 4] = -1
    keys = generator.integers(0, 2**63, tokens).astype(np.uint64)
    return Sampled(keys, generator.integers(0, 10, tokens), best.astype(np.int16))


def test_flows_go_to_the_next_layer_of_the_same_kind() -> None:
    drawn = sample(0)
    found = flows(ROUTERS, drawn)
    assert [(one.source, one.target) for one in found] == [
        ("0.heads", "2.heads"),
        ("0.experts", "1.experts"),
        ("1.experts", "2.experts"),
    ]
    for one, (a, b) in zip(found, [(0, 3), (1, 2), (2, 4)], strict=True):
        expected = np.zeros((ROUTERS[one.source], ROUTERS[one.target]))
        for row in drawn.best.tolist():
            if row[a] >= 0 and row[b] >= 0:
                expected[row[a], row[b]] += 1 / 300
        np.testing.assert_allclose(one.share, expected, rtol=1e-3)


def test_paths_are_counted_as_a_loop_would() -> None:
    drawn = sample(1)
    heads, experts = paths(ROUTERS, drawn, TEXTS)
    assert (heads.routes, heads.routers) == ("heads", ["0.heads", "2.heads"])
    assert experts.routers == ["0.experts", "1.experts", "2.experts"]
    ways = Counter(tuple(row[n] for n in (1, 2, 4)) for row in drawn.best.tolist() if row[4] >= 0)
    assert experts.distinct == len(ways)
    assert experts.tokens == 300
    assert [one.count for one in experts.top] == [count for _, count in ways.most_common(20)]
    for one in experts.top:
        way = tuple(one.choices)
        assert (one.count, one.share) == (ways[way], pytest.approx(ways[way] / 300, rel=1e-4))
        own = Counter(
            i for i, row in zip(drawn.ids.tolist(), drawn.best.tolist(), strict=True) if (row[1], row[2], row[4]) == way
        )
        expected = sorted(own.items(), key=lambda item: (-item[1], item[0]))[:5]
        assert one.tokens == [TEXTS[i] for i, _ in expected]


def test_layers_that_divide_tokens_alike_agree_and_others_do_not() -> None:
    generator = np.random.default_rng(2)
    one = generator.integers(0, 4, 2000)
    renamed, other, single = (3 - one), generator.integers(0, 4, 2000), np.zeros(2000, np.int64)
    best = np.stack([one, renamed, other, single], axis=1).astype(np.int16)
    drawn = Sampled(np.arange(2000, dtype=np.uint64), np.zeros(2000, np.int64), best)
    found = agreement({f"{n}.experts": 4 for n in range(4)}, drawn).nmi
    assert found[0][1] == pytest.approx(1, abs=0.01)
    assert found[0][2] == pytest.approx(0, abs=0.005)
    assert found[0][3] is None
    assert found[3][3] is None
    assert found[0][0] == 1.0
    assert np.array_equal(np.array(found[:3])[:, :3], np.array(found[:3])[:, :3].T)


def test_agreement_is_mutual_information_over_entropies() -> None:
    drawn = sample(3, tokens=50_000)
    found = agreement(ROUTERS, drawn).nmi[1][2]
    rows = drawn.best.tolist()
    one, other = Counter(row[1] for row in rows), Counter(row[2] for row in rows)
    joint = Counter((row[1], row[2]) for row in rows)
    shared = entropy_of(one) + entropy_of(other) - entropy_of(joint)
    assert found == pytest.approx(shared / sqrt(entropy_of(one) * entropy_of(other)), abs=1e-3)


def test_drift_is_total_variation_and_churn() -> None:
    def point(load: list[float]) -> PointRouter:
        return PointRouter(
            load=load, max_over_mean=1, max_violation=0, entropy=1, confidence=0.5, dropped_fraction=0, dead=0
        )

    found = drift(point([0.5, 0.5, 0]), point([0.2, 0.5, 0.3]), np.array([0, 1, 1, 2]), np.array([0, 1, 2, 0]))
    assert (found.total_variation, found.churn) == (pytest.approx(0.3), 0.5)
    same = drift(point([0.5, 0.5]), point([0.5, 0.5]), np.array([0, 1]), np.array([1, 0]))
    assert (same.total_variation, same.churn) == (0, 1)  # all tokens moved, and the load didn't show it
