"""What a run measured, from its `summary.json`, as tables of a model card."""

from collections.abc import Iterable
from typing import Any

_ROUTING = ("load_max_over_mean", "dropped_fraction")  # on held-out text
_SETS = {"held_out": "held out", "test": "test"}


def evaluation_tables(summary: dict[str, Any]) -> list[str]:
    """Scores of a fine-tuned model by set, then a run's single figures.

    Args:
        summary: of a pre-training, of a fine-tuning, or of one of its seeds. That of a fine-tuning tells of all seeds
            but the model is one's: its scores come first, their mean and deviation over the seeds behind.
    """
    scores = list(_scores(summary))
    head = ("set", "metric", "this model", "mean and deviation over seeds")
    single = [(name, figure(value)) for name, value in _own(summary).items() if _is_number(value)]
    rest = [(name, value) for name, value in single if name not in _ROUTING]
    return [
        *([table(head[: len(scores[0])], scores)] if scores else []),
        *([table(("from the run's `summary.json`", ""), rest)] if rest else []),
    ]


def routing_tables(summary: dict[str, Any]) -> list[str]:
    """How even the load was, and how far fine-tuning moved each router from where it started."""
    own = _own(summary)
    balance = [(name, figure(own[name])) for name in _ROUTING if _is_number(own.get(name))]
    drift = own.get("drift") or {}
    moved = [(name, f"{d['changed']:.1%}", f"{d['total_variation']:.1%}") for name, d in drift.items()]
    return [
        *([table(("routing, as measured in its run", ""), balance)] if balance else []),
        *([table(("router", "tokens that choose otherwise than before", "load moved"), moved)] if moved else []),
    ]


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _own(summary: dict[str, Any]) -> dict[str, Any]:
    """What is said of the model itself: of a fine-tuning's seeds, the best one's."""
    seeds = summary.get("seeds") or []
    best = [seed for seed in seeds if seed.get("seed") == summary.get("best_seed")]
    return {**summary, **best[0]} if best else summary


def _scores(summary: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    own, seeds = _own(summary), summary.get("seeds") or []
    for name, called in _SETS.items():
        for metric, value in (own.get(name) or {}).items():
            if not _is_number(value):
                continue
            all_seeds = summary[name][metric] if len(seeds) > 1 else None
            over = (f"{figure(all_seeds['mean'])} +- {figure(all_seeds['deviation'])}",) if all_seeds else ()
            yield called, metric, figure(value), *over


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
