"""Fast matrix multiplication for dense layers: seven products of half the size instead of eight.

Strassen's algorithm (1969) in Winograd's form, seven products and fifteen additions a level, for rows `[T, D]` times a
weight `[D, F]`, recursively until a side would be below `--smallest`. `ratio_to_limit` is torch's product's time over
the contender's, so above 1 is a win; `multiplications` is the share of the plain product's. `error` is the largest
difference from the float64 product over the largest entry, in units of the plain product's own.

It pays where a product of half the size takes well under an eighth of the time plus fifteen passes through memory.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import DTYPES
from benchmarks.common import Row, arguments, device_in_use, interleaved_seconds, show

LIMIT = "limit"


def strassen(a: Tensor, b: Tensor, levels: int) -> Tensor:
    """`a @ b` of `[M, N]` and `[N, P]` with `7^levels` products of sides smaller by `2^levels`.

    Sides that don't divide are padded with zeros.
    """
    if levels == 0:
        return a @ b
    rows, columns, step = a.shape[0], b.shape[1], 2**levels
    a, b = _padded(a, step), _padded(b, step)
    (a11, a12), (a21, a22) = _quarters(a)
    (b11, b12), (b21, b22) = _quarters(b)
    s1 = a21 + a22
    s2 = s1 - a11
    t1 = b12 - b11
    t2 = b22 - t1

    def product(x: Tensor, y: Tensor) -> Tensor:
        return strassen(x, y, levels - 1)

    p1 = product(a11, b11)
    u2 = p1 + product(s2, t2)
    u3 = u2 + product(a11 - a21, b22 - b12)
    p5 = product(s1, t1)
    out = p1.new_empty(a.shape[0], b.shape[1])
    (c11, c12), (c21, c22) = _quarters(out)
    torch.add(p1, product(a12, b21), out=c11)
    torch.add(u2 + p5, product(a12 - s2, b22), out=c12)
    torch.sub(u3, product(a22, t2 - b21), out=c21)
    torch.add(u3, p5, out=c22)
    return out[:rows, :columns]


def _padded(x: Tensor, step: int) -> Tensor:
    rows, columns = x.shape
    missing = (0, -columns % step, 0, -rows % step)
    return F.pad(x, missing) if any(missing) else x


def _quarters(x: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    top, bottom = x.tensor_split(2, 0)
    (a, b), (c, d) = top.tensor_split(2, 1), bottom.tensor_split(2, 1)
    return (a, b), (c, d)


def measure(tokens: int, width: int, hidden: int, dtype: str, smallest: int, rounds: int) -> list[Row]:
    device = device_in_use()
    a = torch.randn(tokens, width, dtype=DTYPES[dtype], device=device)
    b = torch.randn(width, hidden, dtype=DTYPES[dtype], device=device)
    deepest = 0
    while min(tokens, width, hidden) // 2 ** (deepest + 1) >= smallest:
        deepest += 1
    calls: dict[str, Callable[[], Tensor]] = {LIMIT: lambda: a @ b}
    for levels in range(1, deepest + 1):
        calls[f"Strassen, {levels} level{'s' * (levels > 1)}"] = lambda levels=levels: strassen(a, b, levels)
    exact = a.double() @ b.double()
    errors = {name: float((call().double() - exact).abs().max() / exact.abs().max()) for name, call in calls.items()}
    seconds = interleaved_seconds(calls, rounds)
    return [
        {
            "case": f"T{tokens} d{width} ff{hidden}",
            "dtype": dtype,
            "mode": "forward",
            "contender": name,
            "ratio_to_limit": seconds[LIMIT] / taken,
            "multiplications": (7 / 8) ** levels,
            "error": errors[name] / errors[LIMIT],
        }
        for levels, (name, taken) in enumerate(seconds.items())
    ]


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--widths", nargs="+", type=int, default=[512, 1024, 2048, 4096], help="D; F is four times it")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--smallest", type=int, default=256, help="no side gets smaller (default 256)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = [
        row
        for dtype in options.dtypes
        for width in options.widths
        for row in measure(options.tokens, width, 4 * width, dtype, options.smallest, options.rounds)
    ]
    show(f"Fast matrix products, {device_in_use().type}, {options.threads} thread(s)", rows, options.json)


if __name__ == "__main__":
    main()
