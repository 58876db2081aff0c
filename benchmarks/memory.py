"""Memory of forward and backward beyond parameters, their gradients and the inputs, against the dense layer's.

`mib` is the peak of what is allocated during one forward and backward, leaving out the parameters' gradients. On a CPU
torch's profiler records every allocation and release of the allocator (what a library allocates for itself it doesn't
see), and the gradients are told by their addresses; on a GPU it is the allocator's own peak less the gradients' bytes.
`ratio_to_limit` is the limit's bytes over the contender's. Growth with T shows what holds a `[T, E, C]` mask: twice the
tokens, four times the memory.

All of it is some ten minutes' work for one free CPU core, more where other processes want it; `--cases`, `--dtypes`,
`--tokens` and `--contenders` choose a part. Each table comes when it is ready.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reads it with torch; else lines about every call

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import DTYPES, LayerCase, add_options, balanced, given
from benchmarks.common import Row, arguments, device_in_use, save, show
from benchmarks.contenders import LIMIT, layers, leave_out

CASES = {case.name: case for case in (LayerCase(512, 1024, 32, 2), LayerCase(512, 1024, 64, 1))}
TOKENS = (1024, 2048, 4096, 8192)


def peak_bytes(call: Callable[[], None], gradients: Callable[[], list[Tensor]]) -> int:
    """Most bytes that `call` has allocated at once, without the `gradients` it leaves behind."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in gradients())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    assert recorded.profiler is not None
    tree = recorded.profiler.kineto_results.experimental_event_tree()
    events = sorted(_allocations(tree), key=lambda event: event.start_time_ns)
    kept = {gradient.untyped_storage().data_ptr() for gradient in gradients()}
    # An address may have had other tenants; a gradient is the one that comes last and stays.
    last = {event.typed[1].ptr: n for n, event in enumerate(events) if event.typed[1].ptr in kept}
    total = peak = 0
    for n, event in enumerate(events):
        if last.get(event.typed[1].ptr) != n:
            total += event.typed[1].alloc_size  # negative: released
            peak = max(peak, total)
    return peak


def _allocations(tree: list[Any]) -> Iterator[Any]:
    for event in tree:
        if event.typed[0] == _EventType.Allocation:
            yield event
        yield from _allocations(event.children)


def forget(leaves: list[Tensor], inputs: Tensor) -> None:
    for leaf in (*leaves, inputs):
        leaf.grad = None


def measure(case: LayerCase, dtype: str, token_counts: list[int], wanted: list[str]) -> Iterator[list[Row]]:
    """The rows of one number of tokens after the other."""
    torch.manual_seed(0)
    device = device_in_use()
    built = layers(case, DTYPES[dtype], device, wanted)
    for tokens in token_counts:
        routing = given(balanced(tokens, case), case.experts, device)
        x = torch.randn(tokens, case.width, dtype=DTYPES[dtype], device=device)
        found: dict[str, int] = {}
        for name, layer in built.items():
            if reason := layer.hopeless(backward=True):
                leave_out(case.name, name, reason)
                continue
            layer.follow(routing)
            inputs = layer.rows(x)
            leaves = [*layer.parameters(), routing.weights, routing.logits]
            upstream = torch.ones_like(layer(inputs).detach())

            def step(layer=layer, inputs=inputs, upstream=upstream) -> None:
                layer(inputs).backward(upstream)

            step()  # what a first call leaves in caches isn't counted
            forget(leaves, inputs)
            found[name] = peak_bytes(step, lambda leaves=leaves: [p.grad for p in leaves if p.grad is not None])
            forget(leaves, inputs)
        yield [
            {
                "case": f"{case.name} T{tokens}",
                "dtype": dtype,
                "mode": "forward+backward",
                "contender": name,
                "mib": peak / 2**20,
                "ratio_to_limit": found[LIMIT] / peak,
            }
            for name, peak in found.items()
        ]


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    add_options(parser, CASES)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for name in options.cases:
        for dtype in options.dtypes:
            for found in measure(CASES[name], dtype, options.tokens, options.contenders):
                show(f"Peak memory, {found[0]['case']} {dtype}, {device_in_use().type}", found, None)
                rows += found
    save(rows, options.json)


if __name__ == "__main__":
    main()
