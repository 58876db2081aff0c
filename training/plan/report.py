"""A plan as a person reads it, and as JSON. MB, GB and MFLOP are powers of ten."""

from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from training.plan.activations import FLOAT
from training.plan.memory import Memory
from training.plan.plan import Plan, Sheet, best
from training.plan.specs import USABLE
from training.plan.traffic import Traffic


class Unit(NamedTuple):
    """What a table's bytes are given in."""

    name: str
    bytes: float

    def of(self, number: float) -> str:
        """Three digits or more."""
        return f"{number / self.bytes:,.{2 if number >= self.bytes else 3}f}"


def unit_for(most: float) -> Unit:
    """GB from 1 GB on."""
    return Unit("GB", 1e9) if most >= 1e9 else Unit("MB", 1e6)


def print_sheet(sheet: Sheet, console: Console) -> None:
    """One plan in full, and what other ZeRO stages, expert-parallel sizes and numbers of GPUs would make of it."""
    plan = sheet.plan
    console.print(
        f"{plan.gpus} x {plan.gpu.name}; {plan.precision}, ZeRO-{plan.zero_stage}, expert-parallel {plan.expert}\n"
        f"a step of {plan.step_tokens:,.0f} tokens: on each GPU {plan.accumulation} x {plan.tokens:,.0f}\n"
        "computed, not measured: full sequences, equal loads, nothing overlapped\n"
        f"figures of the GPU: {plan.gpu.source}"
    )
    console.print(_parameters(plan))
    flops = plan.flops
    again = f" + recomputed {flops.recomputed / 1e6:,.1f}" if flops.recomputed else ""
    console.print(
        f"MFLOP per token: forward {flops.forward / 1e6:,.1f} + backward {flops.backward / 1e6:,.1f}{again} "
        f"= {flops.total / 1e6:,.1f}"
    )
    console.print(_memory(plan))
    console.print(_stages(sheet.stages))
    console.print(_step(plan))
    console.print(verdict(plan))
    console.print(_sweep(sheet.sweep))
    console.print(_gpus(sheet.gpus))


def verdict(plan: Plan) -> str:
    """What binds, and what it comes to."""
    if not plan.fits:
        unit = unit_for(plan.gpu.memory)
        usable = f"{unit.of(USABLE * plan.gpu.memory)} usable {unit.name} per GPU"
        return (
            f"Does not fit: {unit.of(plan.memory.total)} of {usable}, most of it "
            f"{_largest(plan.memory)}. {_remedy(plan)}"
        )
    return (
        f"{plan.tokens_per_second:,.0f} tokens a second, {_duration(plan.days)} for {plan.max_steps:,} steps; "
        f"bound by {plan.binds}."
    )


def as_json(sheet: Sheet) -> dict[str, Any]:
    """Everything that is printed, in bytes, seconds and FLOPs."""
    return {
        name: _fields(part) if isinstance(part, Plan) else [_fields(plan) for plan in part]
        for name, part in sheet._asdict().items()
    }


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
    either = (plan.memory, plan.memory_otherwise)
    unit = unit_for(min(memory.total for memory in either))
    table = _table(f"{unit.name} per GPU", f"{configured} (set)", otherwise)
    for kind in Memory._fields[:-1]:
        table.add_row(kind, *(unit.of(getattr(memory, kind)) for memory in either))
    table.add_section()
    table.add_row("total", *(unit.of(memory.total) for memory in either))
    table.add_row("fullest in", plan.memory.when, plan.memory_otherwise.when)
    return table


def _stages(plans: list[Plan]) -> Table:
    unit = unit_for(min(plan.memory.total for plan in plans))
    table = _table(f"{unit.name} per GPU", "weights", "gradients", "optimizer", "rest", "total", "ms a step")
    for plan in plans:
        memory = plan.memory
        states = (memory.weights, memory.gradients, memory.optimizer)
        sizes = map(unit.of, (*states, memory.total - sum(states), memory.total))
        table.add_row(f"ZeRO-{plan.zero_stage}", *sizes, _ms(plan))
    if plans[1].memory.buffers > 2 * FLOAT * plans[1].here:  # then the bucket alone is larger than all gradients
        table.caption = (
            "from ZeRO-1 on the rest holds DeepSpeed's bucket for gradients, of the same size for any model; this "
            f"one's need no more than engine.deepspeed.zero_optimization.reduce_bucket_size={plans[1].here}"
        )
    return table


def _step(plan: Plan) -> Table:
    unit = unit_for(max(getattr(plan.traffic, name).bytes for name in Traffic._fields))
    table = _table("a step", f"{unit.name} sent per GPU", "ms", "share")
    for name, seconds in plan.times._asdict().items():
        sent = unit.of(getattr(plan.traffic, name).bytes) if name in Traffic._fields else ""
        label = f"compute at {plan.efficiency:.0%} of peak" if name == "compute" else name.replace("_", "-")
        table.add_row(label, sent, f"{1e3 * seconds:,.1f}", f"{seconds / plan.seconds:.1%}")
    table.add_section()
    table.add_row("total", "", f"{1e3 * plan.seconds:,.1f}", "")
    return table


def _sweep(plans: list[Plan]) -> Table:
    unit = unit_for(min(plan.memory.total for plan in plans))
    table = _table(
        "experts\nover",
        f"{unit.name}\nper GPU",
        "\nfits",
        f"all-to-all\n{unit.name}",
        f"gradients\n{unit.name}",
        "ms\na step",
        "\ntokens/s",
        "\nbound by",
    )
    chosen = best(plans)
    for plan in plans:
        table.add_row(
            f"{plan.expert}{' *' if plan is chosen else ''}",
            unit.of(plan.memory.total),
            "yes" if plan.fits else "no",
            unit.of(plan.traffic.all_to_all.bytes),
            unit.of(plan.traffic.gradients.bytes),
            _ms(plan),
            f"{plan.tokens_per_second:,.0f}",
            plan.binds,
        )
    table.caption = "* fastest that fits" if chosen.fits else "* nearest to fitting; none does"
    return table


def _gpus(plans: list[Plan]) -> Table:
    unit = unit_for(min(plan.memory.total for plan in plans))
    table = _table(
        "\nGPUs",
        "step\ntokens",
        "experts\nover",
        f"{unit.name}\nper GPU",
        "ms\na step",
        "\ntokens/s",
        "tokens/s\nper GPU",
        "\nbound by",
    )
    configured = round(plans[0].step_tokens)
    for plan in plans:
        table.add_row(
            f"{plan.gpus:,}",
            f"{plan.step_tokens / 1e3:,.0f}k{' +' if round(plan.step_tokens) > configured else ''}",
            str(plan.expert),
            unit.of(plan.memory.total),
            _ms(plan),
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.tokens_per_second / plan.gpus:,.0f}",
            plan.binds,
        )
    table.caption = "each at the expert-parallel size that is fastest of those that fit, or nearest to fitting"
    if round(plans[-1].step_tokens) > configured:
        table.caption += "; + train.step_tokens raised to a sequence for each GPU, which is the least"
    return table


def _duration(days: float) -> str:
    for unit, length in (("days", 1.0), ("hours", 24.0), ("minutes", 24.0 * 60)):
        if days * length >= 1:
            return f"{days * length:,.1f} {unit}"
    return f"{days * 86_400:,.1f} seconds"


def _ms(plan: Plan) -> str:
    return f"{1e3 * plan.seconds:,.0f}" if plan.seconds >= 0.1 else f"{1e3 * plan.seconds:.1f}"


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


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
