"""Every attention mechanism in small, for the contracts that all of them keep."""

from typing import Any

WIDTH = 16

KINDS: dict[str, dict[str, Any]] = {
    "softmax": {"kind": "softmax", "heads": 2},
    "softmax without positions, with biases": {"kind": "softmax", "heads": 4, "positions": None, "bias": True},
    "linear": {"kind": "linear", "heads": 4},
    "linear with biases": {"kind": "linear", "heads": 4, "bias": True},
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
}
