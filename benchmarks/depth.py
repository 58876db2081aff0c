"""Blocks that tokens or sequences skip: what a training step saves, against what its arithmetic says it could.

Contenders are one encoder: plain (`limit`: the others' arithmetic at its rate is the bound); with mixture of
depths in every second layer, at capacities 0.5 and 0.25; with stochastic depth rising to 0.2 and 0.5 (in training
alone: at evaluation it is the plain encoder). All have the same sequences of equal length. A step is forward, the mean
square of the states, and the gradients of all parameters, without a head or an optimizer.

`speedup` is the plain encoder's time over the contender's, `by FLOPs` the plain encoder's floating-point operations
over the contender's (stochastic depth: expected ones), and `ratio_to_limit` the first over the second.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Row, arguments, device_in_use, interleaved_seconds, save, show
from benchmarks.contenders import LIMIT
from moe.batch import PackedBatch, pack_lengths, to_device
from moe.config import EncoderConfig
from moe.encoder import Encoder

VOCABULARY = 8192
MODES = ("forward", "forward+backward")


def changes(layers: list[int]) -> dict[str, dict[str, Any]]:
    """What each contender's config has beside the plain one's."""

    def depths(capacity: float) -> dict[str, Any]:
        return {"overrides": [{"layers": layers, "depth": {"kind": "mixture_of_depths", "capacity": capacity}}]}

    return {
        LIMIT: {},
        "ours: mixture of depths 0.5": depths(0.5),
        "ours: mixture of depths 0.25": depths(0.25),
        "ours: stochastic depth 0.2": {"stochastic_depth": {"kind": "linear", "last": 0.2}},
        "ours: stochastic depth 0.5": {"stochastic_depth": {"kind": "linear", "last": 0.5}},
    }


def configs(width: int, depth: int, hidden: int, experts: int) -> dict[str, EncoderConfig]:
    dense = {"kind": "dense", "width": hidden}
    routed = {"kind": "experts", "count": experts, "width": hidden // 2}
    plain = {"vocab_size": VOCABULARY, "width": width, "depth": depth}
    plain["block"] = {"attention": {"heads": width // 64}, "feed_forward": routed if experts else dense}
    every_second = list(range(1, depth, 2))
    return {name: EncoderConfig.model_validate(plain | more) for name, more in changes(every_second).items()}


def expected_flops(config: EncoderConfig, length: int, training: bool) -> float:
    """Of one token; in training the share of blocks that stochastic depth leaves of each layer."""
    each = [block.flops_per_token(config.width, length) for block in config.blocks()]
    drops = config.stochastic_depth if training else None
    rates = drops.rates(config.depth) if drops else [0.0] * config.depth
    return sum((1 - rate) * flops for rate, flops in zip(rates, each, strict=True))


def one_pass(encoder: Encoder, ids: Tensor, batch: PackedBatch, mode: str, dtype: str) -> Callable[[], None]:
    parameters: list[nn.Parameter] = list(encoder.parameters())
    train = mode == "forward+backward"

    def run() -> None:
        encoder.train(train)
        with torch.set_grad_enabled(train), torch.autocast(device_in_use().type, enabled=dtype == "bf16"):
            loss = encoder(ids, batch=batch).last_hidden_state.float().square().mean()
        if train:
            torch.autograd.grad(loss, parameters)
            if encoder.stochastic_depth is not None:  # other sequences skip at the next step
                encoder.stochastic_depth.noise_state.copy_(encoder.stochastic_depth.updated())

    return run


def measure(made: dict[str, EncoderConfig], sequences: int, length: int, dtype: str, rounds: int) -> list[Row]:
    device = device_in_use()
    encoders = {name: Encoder(config).to(device) for name, config in made.items()}
    batch = to_device(pack_lengths([length] * sequences), device)
    ids = torch.randint(0, VOCABULARY, (sequences * length,), device=device)
    rows: list[Row] = []
    for mode in MODES:
        training = mode == "forward+backward"
        chosen = {name: e for name, e in encoders.items() if training or e.stochastic_depth is None}
        calls = {name: one_pass(encoder, ids, batch, mode, dtype) for name, encoder in chosen.items()}
        seconds = interleaved_seconds(calls, rounds)
        flops = {name: expected_flops(made[name], length, training) for name in chosen}
        for name, taken in seconds.items():
            speedup, limit = seconds[LIMIT] / taken, flops[LIMIT] / flops[name]
            row: Row = {"case": f"B{sequences} L{length}", "dtype": dtype, "mode": mode, "contender": name}
            rows.append(row | {"speedup": speedup, "by FLOPs": limit, "ratio_to_limit": speedup / limit})
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--width", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=1024, help="active feed-forward width")
    parser.add_argument("--experts", type=int, default=0, help="so many, of which a token takes two; 0: dense")
    parser.add_argument("--batch", type=int, default=32, help="sequences")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    made = configs(options.width, options.depth, options.hidden, options.experts)
    rows = [r for d in options.dtypes for r in measure(made, options.batch, options.length, d, options.rounds)]
    what = f"{options.experts} experts" if options.experts else "dense"
    size = f"d{options.width} x{options.depth} ff{options.hidden} {what}"
    show(f"Skipped blocks, {size}, {device_in_use().type}, {options.threads} thread(s)", rows, None)
    save(rows, options.json)


if __name__ == "__main__":
    main()
