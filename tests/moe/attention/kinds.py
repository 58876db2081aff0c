"""Every attention mechanism in small, for the contracts that all of them keep."""

from typing import Any

WIDTH = 16

KINDS: dict[str, dict[str, Any]] = {
    "softmax": {"kind": "softmax", "heads": 2},
    "softmax without positions, with biases": {"kind": "softmax", "heads": 4, "positions": None, "bias": True},
    "linear": {"kind": "linear", "heads": 4},
    "linear with biases": {"kind": "linear", "heads": 4, "bias": True},
    "local": {"kind": "local", "heads": 2, "window": 4},
    "local without positions, with biases": {
        "kind": "local",
        "heads": 4,
        "window": 6,
        "positions": None,
        "bias": True,
    },
    "local, global tokens": {"kind": "local", "heads": 2, "window": 4, "global_tokens": {"count": 2}},
    "local, global tokens with own projections": {
        "kind": "local",
        "heads": 2,
        "window": 4,
        "global_tokens": {"count": 1, "projections": "own"},
        "bias": True,
    },
    "adaptive resolution": {
        "kind": "adaptive_resolution",
        "heads": 4,
        "split": {"coarse_heads": {0: 1, 4: 2, 10: 3}},
        "window": 4,
        "pool_size": 2,
        "max_pools": 3,
    },
    "adaptive resolution, routed": {
        "kind": "adaptive_resolution",
        "heads": 2,
        "split": {"kind": "routed", "coarse_heads": [0, 2, 1]},
        "window": 2,
        "max_pools": 4,
        "bias": True,
    },
    "adaptive resolution, routed, without positions": {
        "kind": "adaptive_resolution",
        "heads": 4,
        "split": {"kind": "routed", "coarse_heads": [1, 3], "router": {"score": "sigmoid"}},
        "window": 4,
        "pool_size": 3,
        "positions": None,
    },
}
