"""Every attention mechanism in small, for the contracts that all of them keep."""

from typing import Any

WIDTH = 16

KINDS: dict[str, dict[str, Any]] = {
    "softmax": {"kind": "softmax", "heads": 2},
    "softmax without positions, with biases": {"kind": "softmax", "heads": 4, "positions": None, "bias": True},
    "T5 bias": {"kind": "softmax", "heads": 2, "positions": {"kind": "t5", "buckets": 8, "max_distance": 6}},
    "ALiBi": {"kind": "softmax", "heads": 4, "positions": {"kind": "alibi"}},
    "Shaw": {"kind": "softmax", "heads": 2, "positions": {"kind": "shaw", "max_distance": 3}},
    "Shaw keys": {"kind": "softmax", "heads": 2, "positions": {"kind": "shaw", "values": False}},
    "linear": {"kind": "linear", "heads": 4},
    "linear with biases": {"kind": "linear", "heads": 4, "bias": True},
}
