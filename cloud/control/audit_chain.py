"""The audit chain without a database: how an entry is sealed, how a chain is written to a file, how it is checked.

An exported file is one canonical JSON document per line: first what the file holds (format, tenant, number of entries,
digest of the last), then the entries. Because every byte of a line is determined by its content, any edit shows: it
changes the content, which no longer has its digest, or it is not the canonical spelling of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from model_registry.manifest import canonical_bytes, sha256

FORMAT = "foreshore-audit/1"
GENESIS = "0" * 64
SEALED = ("sequence", "at", "tenant", "actor", "action", "subject", "details", "previous")
MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Verdict:
    """How many entries fit, the digest of the last of them, and what is wrong with the next one (None: nothing)."""

    num_entries: int
    head: str
    fault: str | None


def seal(entry: Mapping[str, Any]) -> str:
    """The digest that an entry must carry."""
    return sha256(canonical_bytes({name: entry[name] for name in SEALED}))


def export_lines(tenant: str, num_entries: int, head: str, entries: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    """The lines of an exported file."""
    yield canonical_bytes({"format": FORMAT, "tenant": tenant, "entries": num_entries, "head": head}) + b"\n"
    for entry in entries:
        yield canonical_bytes({name: entry[name] for name in (*SEALED, "digest")}) + b"\n"


def check_entries(entries: Iterable[Mapping[str, Any]]) -> Verdict:
    """Follow the chain from its beginning; all entries are of one tenant."""
    previous, count, tenant = GENESIS, 0, None
    for entry in entries:
        number = count + 1
        tenant = entry["tenant"] if tenant is None else tenant
        if entry["sequence"] != number:
            return Verdict(count, previous, f"entry {number} is missing")
        if entry["previous"] != previous:
            return Verdict(count, previous, f"entry {number} does not follow the one before it")
        if entry["tenant"] != tenant or entry["digest"] != seal(entry):
            return Verdict(count, previous, f"entry {number} was changed")
        previous, count = str(entry["digest"]), number
    return Verdict(count, previous, None)


def check_export(lines: Iterable[bytes]) -> Verdict:
    """Check an exported file, given its lines with their ends. Never raises for what is in it."""
    reader = _Reader(lines)
    header = reader.next_document()
    if header is None or set(header) != {"format", "tenant", "entries", "head"} or header["format"] != FORMAT:
        return Verdict(0, GENESIS, reader.fault or f"line 1 does not say that this is {FORMAT}")
    found = check_entries(reader.entries())
    fault = reader.fault or found.fault
    if fault is None and (found.num_entries, found.head) != (header["entries"], header["head"]):
        fault = f"the file should hold {header['entries']} entries up to {str(header['head'])[:12]}"
    if fault is None and found.num_entries and header["tenant"] != reader.tenant:
        fault = "line 1 names another tenant than the entries"
    return Verdict(found.num_entries, found.head, fault)


class _Reader:
    """Reads lines strictly; stops at the first that is not canonical, with the reason in `fault`."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._lines = iter(lines)
        self._number = 0
        self.fault: str | None = None
        self.tenant: str | None = None

    def next_document(self) -> dict[str, Any] | None:
        line = next(self._lines, None)
        if line is None:
            return None
        self._number += 1
        try:
            document = json.loads(line) if len(line) <= MAX_LINE_BYTES else None
            if isinstance(document, dict) and canonical_bytes(document) + b"\n" == line:
                return document
        except (ValueError, TypeError, RecursionError):
            document = None
        self.fault = f"line {self._number} was changed: it is not as it was written"
        return None

    def entries(self) -> Iterator[dict[str, Any]]:
        while (document := self.next_document()) is not None:
            if set(document) != {*SEALED, "digest"}:
                self.fault = f"line {self._number} was changed: it is no audit entry"
                return
            self.tenant = str(document["tenant"])
            yield document
