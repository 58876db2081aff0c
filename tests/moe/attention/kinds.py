"""Every attention mechanism in small, for the contracts that all of them keep."""

from typing import Any

WIDTH = 16

KINDS: dict[str, dict[str, Any]] = {
    "softmax": {"kind": "softmax", "heads": 2},
    "softmax without positions, with biases": {"kind": "softmax", "heads": 4, "positions": None, "bias": True},
    **{
        f"routed heads, {name}": {"kind": "routed_heads", "heads": 4, **config}
        for name, config in {
            "by token": {"shared": 1, "router": {"kind": "token_choice", "top_k": 2}},
            "by token with capacity": {
                "shared": 0,
                "positions": None,
                "bias": True,
                "router": {"kind": "token_choice", "top_k": 1, "renormalize": False, "capacity": {"train": 0.5}},
            },
            "by sequence": {"shared": 0, "router": {"kind": "token_choice", "top_k": 2, "scope": "sequence"}},
            "by sequence with biases": {
                "shared": 1,
                "bias": True,
                "positions": None,
                "router": {
                    "kind": "token_choice",
                    "scope": "sequence",
                    "score": "sigmoid",
                    "top_k": 1,
                    "renormalize": False,
                },
            },
            "expert choice": {"shared": 0, "router": {"kind": "expert_choice", "factor": 1.5}},
            "threshold": {"shared": 2, "router": {"kind": "threshold", "max_choices": 2}},
            "hash": {"shared": 2, "bias": True, "router": {"kind": "hash", "top_k": 1}},
            "learned": {"shared": 1, "bias": True, "router": {"kind": "learned", "top_k": 2, "gates": "softmax"}},
            "measured": {"shared": 1, "router": {"kind": "measured", "top_k": 2, "statistic": "maximum"}},
            "learned straight-through": {"shared": 0, "router": {"kind": "learned", "top_k": 1}},
        }.items()
    },
    "linear": {"kind": "linear", "heads": 4},
    "linear with biases": {"kind": "linear", "heads": 4, "bias": True},
}
