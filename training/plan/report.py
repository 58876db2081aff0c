"""A plan as a person reads it, and as JSON. GB and GFLOP are powers of ten."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from training.plan.memory import Memory
from training.plan.plan import Plan, best
from training.plan.specs import USABLE
from training.plan.traffic import Traffic

_GB = 1e9


def print_plan(plan: Plan, stages: list[Plan], swept: list[Plan], console: Console) -> None:
    """One plan in full, and what other ZeRO stages and expert-parallel sizes would make of it."""
    console.print(
        f"{plan.gpus} x {plan.gpu.name}; {plan.precision}, ZeRO-{plan.zero_stage}, expert-parallel {plan.expert}\n"
        f"a step of {plan.step_tokens:,.0f} tokens: on each GPU {plan.accumulation} x {plan.tokens:,.0f}\n"
        "computed, not measured: full sequences, equal loads, nothing overlapped"
    )
    console.print(_parameters(plan))
    flops = plan.flops
    again = f" + recomputed {flops.recomputed / 1e6:,.1f}" if flops.recomputed else ""
    console.print(
        f"MFLOP per token: forward {flops.forward / 1e6:,.1f} + backward {flops.backward / 1e6:,.1f}{again} "
        f"= {flops.total / 1e6:,.1f}"
    )
    console.print(_memory(plan))
    console.print(_stages(stages))
    console.print(_step(plan))
    console.print(verdict(plan))
    console.print(_sweep(swept))


def verdict(plan: Plan) -> str:
    """What binds, and what it comes to."""
    if not plan.fits:
        return (
            f"Does not fit: {_gb(plan.memory.total)} of {_gb(USABLE * plan.gpu.memory)} usable GB per GPU, most of it "
            f"{_largest(plan.memory)}. {_remedy(plan)}"
        )
    return (
        f"{plan.tokens_per_second:,.0f} tokens a second, {plan.days:,.1f} days for {plan.max_steps:,} steps; "
        f"bound by {plan.binds}."
    )


def as_json(plan: Plan, stages: list[Plan], swept: list[Plan]) -> dict[str, Any]:
    """Everything that is printed, in bytes, seconds and FLOPs."""
    others = {"stages": stages, "sweep": swept}
    return {"plan": _fields(plan), **{name: [_fields(other) for other in plans] for name, plans in others.items()}}


def _fields(plan: Plan) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if hasattr(value, "_asdict"):
            return {name: plain(field) for name, field in value._asdict().items()}
        return value

    derived = {name: getattr(plan, name) for name in ("seconds", "step_tokens", "tokens_per_second", "days", "fits")}
    return {**plain(plan), **derived, "binds": plan.binds, "memory_total": plan.memory.total}


def _parameters(plan: Plan) -> Table:
    table = _table("parameters", "number", "share")
    total = plan.parameters.total
    for name, number in plan.parameters._asdict().items():
        table.add_row(name, f"{number:,}", f"{number / total:.1%}")
    table.add_section()
    table.add_row("total", f"{total:,}", "")
    table.add_row("a token meets", f"{plan.active:,}", f"{plan.active / total:.1%}")
    table.add_row("on one GPU, before ZeRO", f"{plan.here:,}", f"{plan.here / total:.1%}")
    return table


def _memory(plan: Plan) -> Table:
    """At the fullest moment, as configured and with checkpointing the other way round."""
    names = ["recomputing blocks", "keeping all"]
    configured, otherwise = names if plan.checkpointing else names[::-1]
    table = _table("GB per GPU", f"{configured} (set)", otherwise)
    for kind in Memory._fields[:-1]:
        table.add_row(kind, _gb(getattr(plan.memory, kind)), _gb(getattr(plan.memory_otherwise, kind)))
    table.add_section()
    table.add_row("total", _gb(plan.memory.total), _gb(plan.memory_otherwise.total))
    table.add_row("fullest in", plan.memory.when, plan.memory_otherwise.when)
    return table


def _stages(plans: list[Plan]) -> Table:
    table = _table("GB per GPU", "weights", "gradients", "optimizer", "rest", "total", "ms a step")
    for plan in plans:
        memory = plan.memory
        states = (memory.weights, memory.gradients, memory.optimizer)
        sizes = map(_gb, (*states, memory.total - sum(states), memory.total))
        table.add_row(f"ZeRO-{plan.zero_stage}", *sizes, f"{1e3 * plan.seconds:,.0f}")
    return table


def _step(plan: Plan) -> Table:
    table = _table("a step", "GB sent per GPU", "ms", "share")
    for name, seconds in plan.times._asdict().items():
        sent = _gb(getattr(plan.traffic, name).bytes) if name in Traffic._fields else ""
        label = f"compute at {plan.efficiency:.0%} of peak" if name == "compute" else name.replace("_", "-")
        table.add_row(label, sent, f"{1e3 * seconds:,.1f}", f"{seconds / plan.seconds:.1%}")
    table.add_section()
    table.add_row("total", "", f"{1e3 * plan.seconds:,.1f}", "")
    return table


def _sweep(plans: list[Plan]) -> Table:
    table = _table(
        "experts\nover",
        "GB\nper GPU",
        "\nfits",
        "all-to-all\nGB",
        "gradients\nGB",
        "ms\na step",
        "\ntokens/s",
        "\nbound by",
    )
    chosen = best(plans)
    for plan in plans:
        table.add_row(
            f"{plan.expert}{' *' if plan is chosen else ''}",
            _gb(plan.memory.total),
            "yes" if plan.fits else "no",
            _gb(plan.traffic.all_to_all.bytes),
            _gb(plan.traffic.gradients.bytes),
            f"{1e3 * plan.seconds:,.0f}",
            f"{plan.tokens_per_second:,.0f}",
            plan.binds,
        )
    table.caption = "* fastest that fits" if chosen.fits else "* nearest to fitting; none does"
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _gb(number: float) -> str:
    return f"{number / _GB:,.2f}" if number >= _GB else f"{number / _GB:.3f}"


def _largest(memory: Memory) -> str:
    return max(Memory._fields[:-1], key=lambda kind: float(getattr(memory, kind)))


def _remedy(plan: Plan) -> str:
    """What to change, by what takes most."""
    match _largest(plan.memory):
        case "activations" | "workspace":
            recompute = "" if plan.checkpointing else ", or set train.activation_checkpointing: true"
            return f"Lower train.micro_batch_tokens{recompute}."
        case "buffers":
            return "Lower engine.deepspeed.zero_optimization.reduce_bucket_size."
        case _ if plan.zero_stage < 2:
            return "Raise parallel.zero_stage or parallel.expert, or take more GPUs."
        case _:
            return "Raise parallel.expert, or take more GPUs, or a smaller model."
