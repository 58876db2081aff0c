"""Which of our backends is fastest where: the table that `backend: auto` looks up (`moe/experts/fastest.json`).

Training steps (forward and backward) of one layer of 32 experts (d 512, ff 1024, K 2), by rows per expert. `--write`
puts this machine's winners into the table, and what was measured beside them, and leaves other machines' alone.
"""

import json
from datetime import date
from itertools import groupby
from pathlib import Path

import torch

from benchmarks.cases import DTYPES, LayerCase, balanced, given
from benchmarks.common import Row, arguments, device_in_use, interleaved_seconds, save, show, train_call
from benchmarks.contenders import layers
from moe.experts.fastest import TABLE, machine

ROWS = (1, 4, 16, 64, 256, 1024)  # per expert
CASE = LayerCase(512, 1024, 32, 2)
BACKENDS = ("torch", "cpu", "triton")


def measure(dtype: str, rounds: int) -> list[Row]:
    torch.manual_seed(0)
    device = device_in_use()
    built = layers(CASE, DTYPES[dtype], device, [f"ours {backend}" for backend in BACKENDS])
    ours = {backend: built[f"ours {backend}"] for backend in BACKENDS if f"ours {backend}" in built}
    rows: list[Row] = []
    for per_expert in ROWS:
        tokens = per_expert * CASE.experts // CASE.top_k
        routing = given(balanced(tokens, CASE), CASE.experts, device)
        x = torch.randn(tokens, CASE.width, dtype=DTYPES[dtype], device=device)
        calls = {}
        for backend, layer in ours.items():
            layer.follow(routing)
            inputs = layer.rows(x)
            calls[backend] = train_call(layer, inputs, [inputs, *layer.parameters(), routing.weights])
        seconds = interleaved_seconds(calls, rounds)
        best = min(seconds, key=lambda backend: seconds[backend])
        rows.append(
            {"machine": machine(device), "dtype": dtype, "rows per expert": per_expert, "fastest": best}
            | {f"{backend} / fastest": seconds[backend] / seconds[best] for backend in seconds}
        )
    return rows


def write(rows: list[Row], threads: int, table: Path) -> None:
    """This machine's winners for each dtype, from how many rows per expert on each wins; and the rows themselves."""
    whole = json.loads(table.read_text(encoding="utf-8"))
    short_rows = [
        {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items() if key != "machine"}
        for row in rows
    ]
    measured = {"date": date.today().isoformat(), "torch": torch.__version__, "threads": threads, "rows": short_rows}
    whole.setdefault("measured", {})[rows[0]["machine"]] = measured
    for (where, short), group in groupby(rows, key=lambda row: (row["machine"], row["dtype"])):
        steps: dict[str, str] = {}
        for row in group:
            if row["fastest"] not in [*steps.values()][-1:]:
                steps[str(row["rows per expert"]) if steps else "0"] = row["fastest"]
        whole["fastest"].setdefault(where, {})[str(DTYPES[short]).removeprefix("torch.")] = steps
    table.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--write", action="store_true", help=f"update {TABLE.name}")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows = [row for dtype in DTYPES for row in measure(dtype, options.rounds)]
    show(f"Backends, {options.threads} thread(s)", rows, None)
    save(rows, options.json)
    if options.write:
        write(rows, options.threads, TABLE)


if __name__ == "__main__":
    main()
