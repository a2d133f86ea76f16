"""The language of group filters: `profile = jetson* and not (label.site = lab or memory < 4GiB)`.

Grammar, loosest first: `or`, `and`, `not`, then parentheses or a term. A term is `field op value` with one of
= != < <= > >=, or `field in (value, ...)`, `field not in (...)`. A value is a bare word or "in quotes"; in = != and in,
`*` stands for any text. `a != b` is `not a = b`, so it also holds for a device that says nothing about a.

`parse_filter` gives the expression or says where the text goes wrong; `condition` makes SQL of it, so that the
database does the looking. Nothing here reads a device.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from sqlalchemy import ColumnElement, SQLColumnExpression, and_, exists, false, not_, or_
from sqlalchemy import true as sql_true

from cloud.control.device_facts import version_number
from cloud.control.tables import Device, DeviceFact
from wire.errors import InvalidInputError

MAX_CHARS = 1000
MAX_TERMS = 100
MAX_DEPTH = 20
FIELDS = ("device", "online", "profile", "target", "key", "architecture", "accelerator", "feature", "runtime", "memory",
          "budget", "context", "agent", "runs", "label.NAME")  # fmt: skip
COMPARED = frozenset({"memory", "budget", "context", "agent"})
ORDERINGS: dict[str, Callable[[SQLColumnExpression[float | None], float], ColumnElement[bool]]] = {
    "<": lambda column, value: column < value,
    "<=": lambda column, value: column <= value,
    ">": lambda column, value: column > value,
    ">=": lambda column, value: column >= value,
}
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

_TOKEN = re.compile(
    r"""\s*(?:(?P<op><=|>=|!=|=|<|>)|(?P<mark>[(),])|"(?P<quoted>[^"]*)"|(?P<word>[^\s()<>=!,"]+))""", re.VERBOSE
)


@dataclass(frozen=True)
class Term:
    """`field op value`."""

    field: str
    op: str
    value: str


@dataclass(frozen=True)
class Not:
    """The opposite."""

    part: Expression


@dataclass(frozen=True)
class All:
    """Every part holds."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True)
class Any:
    """Some part holds."""

    parts: tuple[Expression, ...]


Expression = Term | Not | All | Any


@dataclass(frozen=True)
class _Token:
    kind: str  # op, mark, quoted, word, end
    text: str
    at: int  # from 1

    @property
    def keyword(self) -> str:
        return self.text.lower() if self.kind == "word" else ""


def parse_filter(text: str) -> Expression:
    """Read a filter; `InvalidInputError` says at which character it goes wrong, and what was expected there."""
    if not text.strip():
        raise InvalidInputError("the filter is empty", remedy="for example: profile = jetson* and online = true")
    if len(text) > MAX_CHARS:
        raise InvalidInputError(f"the filter has {len(text)} characters", remedy=f"at most {MAX_CHARS}")
    return _Parser(text).parse()


class _Parser:
    """Recursive descent over the tokens."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = _tokens(text)
        self._next = 0
        self._num_terms = 0

    def parse(self) -> Expression:
        found = self._either(0)
        token = self._peek()
        if token.kind != "end":
            _fail(self._text, token.at, f"expected 'and', 'or' or the end, found {token.text!r}")
        return found

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._tokens[self._next]
        self._next += token.kind != "end"
        return token

    def _either(self, depth: int) -> Expression:
        parts = [self._both(depth)]
        while self._peek().keyword == "or":
            self._take()
            parts.append(self._both(depth))
        return parts[0] if len(parts) == 1 else Any(tuple(parts))

    def _both(self, depth: int) -> Expression:
        parts = [self._one(depth)]
        while self._peek().keyword == "and":
            self._take()
            parts.append(self._one(depth))
        return parts[0] if len(parts) == 1 else All(tuple(parts))

    def _one(self, depth: int) -> Expression:
        token = self._peek()
        if depth > MAX_DEPTH:
            _fail(self._text, token.at, f"the filter is nested deeper than {MAX_DEPTH}")
        if token.keyword == "not":
            self._take()
            return Not(self._one(depth + 1))
        if token.text == "(" and token.kind == "mark":
            self._take()
            inside = self._either(depth + 1)
            self._expect(")")
            return inside
        return self._term()

    def _term(self) -> Expression:
        field = self._field()
        token = self._take()
        if token.keyword in ("in", "not"):
            if token.keyword == "not" and self._take().keyword != "in":
                _fail(self._text, token.at, "expected 'not in'")
            listed = self._list(field)
            return Not(listed) if token.keyword == "not" else listed
        if token.kind != "op":
            _fail(self._text, token.at, f"expected =, !=, <, <=, >, >= or in, found {token.text or 'the end'!r}")
        value = self._value(field, token)
        return Not(Term(field, "=", value)) if token.text == "!=" else Term(field, token.text, value)

    def _field(self) -> str:
        token = self._take()
        name = token.text
        is_label = re.fullmatch(r"label\.[A-Za-z0-9_.-]{1,63}", name) is not None
        if token.kind != "word" or not (is_label or name in FIELDS[:-1]):
            _fail(self._text, token.at, f"expected a field ({', '.join(FIELDS)}), found {name or 'the end'!r}")
        return name

    def _list(self, field: str) -> Expression:
        self._expect("(")
        equals = _Token("op", "=", self._peek().at)
        parts: list[Expression] = [Term(field, "=", self._value(field, equals))]
        while self._peek().kind == "mark" and self._peek().text == ",":
            self._take()
            parts.append(Term(field, "=", self._value(field, equals)))
        self._expect(")")
        return Any(tuple(parts))

    def _value(self, field: str, op: _Token) -> str:
        token = self._take()
        if token.kind not in ("word", "quoted"):
            _fail(self._text, token.at, f"expected a value, found {token.text or 'the end'!r}")
        self._num_terms += 1
        if self._num_terms > MAX_TERMS:
            _fail(self._text, token.at, f"more than {MAX_TERMS} values")
        if field == "online" and (op.text not in ("=", "!=") or token.text not in ("true", "false")):
            _fail(self._text, token.at, "online is compared with = true or = false")
        if op.text in ORDERINGS:
            if field not in COMPARED and not field.startswith("label."):
                _fail(self._text, op.at, f"{field} has no order; use = or !=")
            if number_of(field, token.text) is None:
                _fail(self._text, token.at, f"{token.text!r} is no {'version' if field == 'agent' else 'number'}")
        return token.text

    def _expect(self, mark: str) -> None:
        token = self._take()
        if token.kind != "mark" or token.text != mark:
            _fail(self._text, token.at, f"expected {mark!r}, found {token.text or 'the end'!r}")


def _tokens(text: str) -> list[_Token]:
    tokens, at = list[_Token](), 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            at += len(text[at:]) - len(text[at:].lstrip())
            what = "a quotation that does not end" if text[at] == '"' else f"{text[at]!r} means nothing here"
            _fail(text, at + 1, what)
        tokens.append(_Token(match.lastgroup, match[match.lastgroup], match.start(match.lastgroup) + 1))
        at = match.end()
    return [*tokens, _Token("end", "", len(text) + 1)]


def _fail(text: str, at: int, what: str) -> NoReturn:
    shown = text[max(at - 21, 0) : at + 19]
    raise InvalidInputError(
        f"filter, character {at}: {what} (near {shown!r})", remedy="see docs/control.md, Groups", position=at
    )


def number_of(field: str, text: str) -> float | None:
    """The number that a value is compared as: a version, or a size such as 4GiB."""
    if field == "agent":
        return version_number(text)
    match = re.fullmatch(r"(-?\d{1,15}(?:\.\d{1,9})?)\s*(|[kmgt]i?)b?", text.lower())
    return None if match is None else float(match[1]) * UNITS[match[2]]


# SQL


def condition(expression: Expression) -> ColumnElement[bool]:
    """The expression over rows of `Device`."""
    match expression:
        case Not(part):
            return not_(condition(part))
        case All(parts):
            return and_(*(condition(part) for part in parts))
        case Any(parts):
            return or_(*(condition(part) for part in parts))
        case Term(field, op, value):
            return _term_condition(field, op, value)


def _term_condition(field: str, op: str, value: str) -> ColumnElement[bool]:
    if field == "online":
        return Device.online.is_(value == "true")
    if field == "device":
        return _equals(Device.device_id, value)
    number = number_of(field, value)
    if op in ORDERINGS:
        return false() if number is None else _has(field, ORDERINGS[op](DeviceFact.number, number))
    if field in COMPARED and number is not None and "*" not in value:
        return _has(field, DeviceFact.number == number)
    return _has(field, _equals(DeviceFact.value, value))


def _has(field: str, holds: ColumnElement[bool]) -> ColumnElement[bool]:
    return exists().where(
        DeviceFact.tenant == Device.tenant, DeviceFact.device_id == Device.device_id, DeviceFact.name == field, holds
    )


def _equals(column: SQLColumnExpression[str], value: str) -> ColumnElement[bool]:
    if value == "*":
        return sql_true()
    if "*" not in value:
        return column == value
    escaped = re.sub(r"([\\%_])", r"\\\1", value).replace("*", "%")
    return column.like(escaped, escape="\\")
