"""`--fail-if EXPRESSION`: a condition on each router's figures.

    expression  = term { "or" term }
    term        = factor { "and" factor }
    factor      = "not" factor | "(" expression ")" | comparison
    comparison  = figure operator number
    operator    = "<" | "<=" | ">" | ">=" | "==" | "!="
    number      = digits with an optional sign, fraction and exponent, and an optional "%"

It is parsed, never evaluated as code. It is asked of every router by itself, and those for which it holds fail. A
figure that a router hasn't (null in stats.json, and balance of a router whose load is by design) makes its
comparison false, whatever the operator.
"""

import operator
import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import NamedTuple

from routing.errors import UserError
from training.inspection.schema import Router
from training.inspection.verdict import collapse_of

# What can be compared: a figure's name, where it comes from, and whether it is of balance.
_BALANCE: dict[str, Callable[[Router], float | None]] = {
    "max_over_mean": lambda router: router.max_over_mean,
    "max_violation": lambda router: router.max_violation,
    "coefficient_of_variation": lambda router: router.coefficient_of_variation,
    "load_entropy": lambda router: router.load_entropy,
    "collapse": collapse_of,
    "dead_experts": lambda router: len(router.dead),
}
_OTHERS: dict[str, Callable[[Router], float | None]] = {
    "identical_experts": lambda router: len(router.identical),
    "entropy": lambda router: router.entropy,
    "confidence": lambda router: router.confidence,
    "margin": lambda router: router.margin,
    "dropped_fraction": lambda router: router.dropped_fraction,
    "known_by_token": lambda router: router.known_by_token,
    "known_by_position": lambda router: router.known_by_position,
}
FIGURES = (*_BALANCE, *_OTHERS)

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
_TOKEN = re.compile(
    r"\s*(?:(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?%?)|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<operator><=|>=|==|!=|<|>)|(?P<bracket>[()]))"
)
_DEEPEST = 50  # brackets and nots, far below Python's own limit


class Condition(NamedTuple):
    """A parsed expression."""

    text: str
    holds: Callable[[Router], bool]
    figures: list[str]  # that it compares, each once


def parse_condition(text: str) -> Condition:
    """Read an expression.

    Raises:
        UserError: showing where it is wrong and what is valid there.
    """
    parser = _Parser(text)
    holds = parser.expression(0)
    parser.end()
    return Condition(text, holds, list(dict.fromkeys(parser.figures)))


def failures(condition: Condition, routers: list[Router]) -> list[str]:
    """A line for each router that fails, with the figures that the condition compares."""
    return [f"{router.name}: {_told(condition, router)}" for router in routers if condition.holds(router)]


def figure_of(router: Router, name: str) -> float | None:
    """A figure by its name; None if the router hasn't it."""
    if name in _BALANCE:
        return None if router.alike else _BALANCE[name](router)
    return _OTHERS[name](router)


def _told(condition: Condition, router: Router) -> str:
    values = ((name, figure_of(router, name)) for name in condition.figures)
    return ", ".join(f"{name} = {'none' if value is None else f'{value:g}'}" for name, value in values)


class _Token(NamedTuple):
    kind: str  # "number", "name", "operator", "bracket" or "end"
    text: str
    start: int


class _Parser:
    """Recursive descent; every method reads one rule of the grammar and gives what decides it."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = self._read()
        self._next = 0
        self.figures: list[str] = []

    def expression(self, depth: int) -> Callable[[Router], bool]:
        parts = [self._term(depth)]
        while self._took("or"):
            parts.append(self._term(depth))
        return parts[0] if len(parts) == 1 else lambda router: any(part(router) for part in parts)

    def end(self) -> None:
        if self._token.kind != "end":
            raise self._mistake("expected 'and', 'or' or the end")

    def _term(self, depth: int) -> Callable[[Router], bool]:
        parts = [self._factor(depth)]
        while self._took("and"):
            parts.append(self._factor(depth))
        return parts[0] if len(parts) == 1 else lambda router: all(part(router) for part in parts)

    def _factor(self, depth: int) -> Callable[[Router], bool]:
        if depth > _DEEPEST:
            raise self._mistake(f"more than {_DEEPEST} brackets within each other")
        if self._took("not"):
            inner = self._factor(depth + 1)
            return lambda router: not inner(router)
        if self._took("("):
            inner = self.expression(depth + 1)
            if not self._took(")"):
                raise self._mistake("expected ')'")
            return inner
        return self._comparison()

    def _comparison(self) -> Callable[[Router], bool]:
        name = self._expect("name", "a figure").text
        if name not in FIGURES:
            self._next -= 1
            near = get_close_matches(name, FIGURES, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise self._mistake(f"there is no figure '{name}'; {hint}there are {', '.join(FIGURES)}")
        compare = _OPERATORS[self._expect("operator", "one of < <= > >= == !=").text]
        number = self._expect("number", "a number").text
        limit = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
        self.figures.append(name)

        def holds(router: Router) -> bool:
            value = figure_of(router, name)
            return value is not None and compare(value, limit)

        return holds

    @property
    def _token(self) -> _Token:
        return self._tokens[self._next]

    def _took(self, text: str) -> bool:
        found = self._token.text == text and self._token.kind in ("name", "bracket")
        self._next += found
        return found

    def _expect(self, kind: str, what: str) -> _Token:
        token = self._token
        if token.kind != kind or token.text in ("and", "or", "not"):
            raise self._mistake(f"expected {what}")
        self._next += 1
        return token

    def _read(self) -> list[_Token]:
        tokens, at = [], 0
        while self._text[at:].strip():
            found = _TOKEN.match(self._text, at)
            if found is None:
                start = at + len(self._text[at:]) - len(self._text[at:].lstrip())
                self._tokens, self._next = [_Token("?", self._text[start], start)], 0
                raise self._mistake("this stands in no expression")
            assert found.lastgroup is not None
            tokens.append(_Token(found.lastgroup, found[found.lastgroup], found.start(found.lastgroup)))
            at = found.end()
        return [*tokens, _Token("end", "", len(self._text))]

    def _mistake(self, problem: str) -> UserError:
        token = self._token
        given = f"'{token.text}'" if token.text else "the end"
        return UserError(
            f"--fail-if can't be read at {given}: {problem}\n  {self._text}\n  {' ' * token.start}^\n"
            "give comparisons such as: max_violation > 2 or dead_experts > 0"
        )
