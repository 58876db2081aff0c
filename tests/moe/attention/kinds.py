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
    "linformer": {"kind": "linformer", "heads": 2, "rank": 4, "max_length": 20},
    "linformer, a projection for each head, with biases": {
        "kind": "linformer",
        "heads": 4,
        "rank": 3,
        "max_length": 24,
        "shared": "none",
        "bias": True,
    },
    "linformer, one projection": {
        "kind": "linformer",
        "heads": 2,
        "rank": 5,
        "max_length": 20,
        "shared": "keys_values",
    },
    "nystrom": {"kind": "nystrom", "heads": 2, "landmarks": 4, "convolution": 3},
    "nystrom, long convolution, with biases": {"kind": "nystrom", "heads": 4, "landmarks": 3, "bias": True},
    "nystrom of rotary positions without convolution": {
        "kind": "nystrom",
        "heads": 2,
        "landmarks": 2,
        "convolution": None,
        "inverse_start": "sequence",
        "positions": {},
    },
    "mixed": {"kind": "mixed", "heads": 4},
    "mixed, all heads in both halves, biases, no positions": {
        **{"kind": "mixed", "heads": 2, "head_ratio": 1, "kernel_size": 5, "positions": None, "bias": True},
    },
    "mixed, one head of each, wide kernel": {"kind": "mixed", "heads": 4, "head_ratio": 4, "kernel_size": 19},
    "lightweight convolution": {"kind": "lightweight_convolution", "heads": 4},
    "lightweight convolution with biases": {"kind": "lightweight_convolution", "kernel_size": 3, "bias": True},
    "dynamic convolution": {"kind": "dynamic_convolution", "heads": 2, "kernel_size": 5},
    "dynamic convolution with biases": {"kind": "dynamic_convolution", "heads": 8, "bias": True},
    "span convolution": {"kind": "span_convolution", "heads": 4},
    "span convolution with biases": {"kind": "span_convolution", "heads": 2, "kernel_size": 3, "bias": True},
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
