"""Healthy or not: the illnesses of routers, told in sentences with numbers. Pure."""

from collections.abc import Iterator

from training.inspection.figures import DEAD, IDENTICAL
from training.inspection.schema import Finding, Router, Verdict

# What a healthy router keeps to.
COLLAPSED = 0.5  # of the way from balance to all tokens taking the same choices
VIOLATION = 2.0  # MaxVio: the fullest choice takes three times its fair share
KNOWN_BY_POSITION = 0.9  # of the best choice's entropy
DROPPED = 0.1  # of the assignments
ENOUGH = 100  # tokens that a choice would have to get, before it can be called dead


def verdict(routers: list[Router], notes: list[str]) -> Verdict:
    """Name every illness of every router, and nothing else.

    A collapsed layer is called that alone: that its other choices are starved is the same illness. Of routers whose
    load is by design, balance isn't asked.
    """
    findings = [finding for router in routers for finding in _findings(router)]
    ill = list(dict.fromkeys(finding.router for finding in findings))
    few = [router.name for router in routers if not router.alike and not _enough(router)]
    if few:
        notes = [
            f"Too little text to tell dead choices of {_listed(few)}: each choice's fair share would be below {ENOUGH} "
            "tokens.",
            *notes,
        ]
    if findings:
        summary = [f"Not healthy: {len(ill)} of {len(routers)} routers {'is' if len(ill) == 1 else 'are'} ill."]
        summary += [finding.sentence for finding in findings]
    else:
        summary = [f"Healthy: {_worst(routers)}"]
    return Verdict(healthy=not findings, summary=summary, findings=findings, notes=notes)


def _findings(router: Router) -> Iterator[Finding]:
    if not router.alike:
        collapse = collapse_of(router)
        if collapse > COLLAPSED:
            yield _collapsed(router, collapse)
        else:
            if router.max_violation > VIOLATION:
                yield _unbalanced(router)
            if router.dead and _enough(router):
                yield _dead(router)
    if router.known_by_position is not None and router.known_by_position > KNOWN_BY_POSITION:
        yield _position_only(router)
    if router.dropped_fraction > DROPPED:
        yield _dropping(router)
    for group in groups_of(router.identical):
        yield _identical(router, group)


def collapse_of(router: Router) -> float:
    """How far the load is on the way from balance (0) to all tokens taking the same K choices (1).

    `(s - K/E) / (1 - K/E)`, where s is the share of the K fullest of E choices.
    """
    usual = max(1, round(router.top_k))
    if usual >= router.choices:
        return 0.0
    fair = usual / router.choices
    return (sum(sorted(router.load)[-usual:]) - fair) / (1 - fair)


def groups_of(pairs: list[tuple[int, int]]) -> list[list[int]]:
    """Choices that are alike, directly or through others."""
    groups: list[set[int]] = []
    for pair in pairs:
        touched = [group for group in groups if group & set(pair)]
        groups = [group for group in groups if group not in touched] + [set(pair).union(*touched)]
    return sorted(sorted(group) for group in groups)


def _collapsed(router: Router, collapse: float) -> Finding:
    usual = max(1, round(router.top_k))
    order = sorted(range(router.choices), key=lambda choice: -router.load[choice])[:usual]
    share = sum(router.load[choice] for choice in order)
    sentence = (
        f"{_where(router)} has collapsed: {_some(router, order)} {'takes' if usual == 1 else 'take'} {share:.0%} of "
        f"all assignments, of {router.choices} choices."
    )
    return _finding("collapsed", router, sorted(order), collapse, COLLAPSED, sentence)


def _unbalanced(router: Router) -> Finding:
    fullest = max(range(router.choices), key=lambda choice: router.load[choice])
    sentence = (
        f"{_where(router)} is unbalanced: {_some(router, [fullest])} takes {router.load[fullest]:.0%} of assignments, "
        f"{router.max_over_mean:.1f} times its fair share."
    )
    return _finding("unbalanced", router, [fullest], router.max_violation, VIOLATION, sentence)


def _dead(router: Router) -> Finding:
    most = max(router.load[choice] for choice in router.dead)
    one = len(router.dead) == 1
    takes = "no token" if most == 0 else f"at most {most:.3%} of assignments"
    sentence = (
        f"{_where(router)}: {_some(router, router.dead)} {'is' if one else 'are'} dead: "
        f"{'it takes' if one else 'they take'} {takes}, of {router.tokens:,} tokens."
    )
    return _finding("dead", router, router.dead, most * router.choices, DEAD, sentence)


def _identical(router: Router, group: list[int]) -> Finding:
    told = router.similarity.output if router.similarity.output is not None else router.similarity.weight
    assert told is not None
    value = max(told[a][b] for a, b in router.identical if a in group)
    what = "outputs" if router.similarity.output is not None else "weights"
    sentence = (
        f"{_where(router)}: {_some(router, group)} are identical: their {what} have a cosine similarity of {value:.3f}."
    )
    return _finding("identical", router, group, value, IDENTICAL, sentence)


def _position_only(router: Router) -> Finding:
    value = router.known_by_position or 0.0
    sentence = (
        f"{_where(router)}: the router reads only position: it decides {value:.0%} of a token's choice of "
        f"{_one(router)}."
    )
    return _finding("position_only", router, [], value, KNOWN_BY_POSITION, sentence)


def _dropping(router: Router) -> Finding:
    value = router.dropped_fraction
    sentence = f"{_where(router)} drops {value:.0%} of its assignments: its capacity is too small for its balance."
    return _finding("dropping", router, [], value, DROPPED, sentence)


def _finding(kind: str, router: Router, choices: list[int], value: float, limit: float, sentence: str) -> Finding:
    return Finding.model_validate(
        {"kind": kind, "router": router.name, "layer": router.layer, "choices": choices}
        | {"value": value, "limit": limit, "sentence": sentence}
    )


def _worst(routers: list[Router]) -> str:
    balanced = [router for router in routers if not router.alike]
    if not balanced:
        return "no two choices are identical (the load of all routers is by design)."
    fullest = max(balanced, key=lambda router: router.max_over_mean)
    choice = max(range(fullest.choices), key=lambda one: fullest.load[one])
    dropped = max(router.dropped_fraction for router in balanced)
    return (
        f"no choice is dead, none identical; the fullest is {_some(fullest, [choice])} of layer {fullest.layer} with "
        f"{fullest.max_over_mean:.2f} times its fair share, and at most {dropped:.1%} of assignments are dropped."
    )


def _enough(router: Router) -> bool:
    return router.tokens * router.top_k / router.choices >= ENOUGH


def _one(router: Router) -> str:
    return {"experts": "expert", "heads": "head", "splits": "split"}.get(router.routes, "choice")


def _some(router: Router, choices: list[int]) -> str:
    return f"{_one(router)}{'s' if len(choices) > 1 else ''} {_listed([str(choice) for choice in choices])}"


def _where(router: Router) -> str:
    """ "experts" go without saying."""
    return f"Layer {router.layer}" + ("" if router.routes == "experts" else f" ({router.routes})")


def _listed(names: list[str], most: int = 8) -> str:
    shown = names[:most] + ([f"{len(names) - most} more"] if len(names) > most else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
