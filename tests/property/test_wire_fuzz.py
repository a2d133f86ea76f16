"""Made-up messages of every kind for every reader: what is wrong is refused with a code, a sentence and a remedy.

`FORESHORE_FUZZ=10000` makes as many as the name of the goal says; continuous integration makes a tenth.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tuf.api.metadata import Root, Snapshot, Targets, Timestamp

from edge_agent.verify import Director, open_desired
from model_registry.trust.trusted import read_metadata
from tests.property.test_registry_properties import TRUSTED, readers
from tests.unit.test_wire_golden import documents
from wire import topics
from wire.errors import ForeshoreError

NUM_MESSAGES = int(os.environ.get("FORESHORE_FUZZ", "1000"))

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["a" * 64, "../../etc", "2026-01-01T00:00:00Z", "9" * 400, "\x00", "=", "AAAA"])
)
values = st.recursive(
    scalars,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=8), below, max_size=3),
    max_leaves=8,
)


def all_readers() -> dict[str, Callable[[bytes], Any]]:
    """Every reader of bytes that cross a process boundary, by the golden document that it accepts (if there is one)."""
    found = readers()
    director = Director(TRUSTED, 1)
    found["envelope.json"] = partial(
        open_desired, director=director, tenant="acme", device_id="edge-1", last_generation=0
    )
    for kind in (Root, Timestamp, Snapshot, Targets):
        found[f"{kind.type}.tuf"] = partial(read_metadata, kind)
    found["topic"] = lambda data: topics.parse_device(data.decode("utf-8", "replace"))
    return found


READERS = all_readers()
GOLDEN = documents()


@st.composite
def messages(draw: st.DrawFn) -> tuple[str, bytes]:
    """A reader and bytes for it: a golden document bent somewhere, JSON out of thin air, or noise."""
    name = draw(st.sampled_from(sorted(READERS)))
    data = GOLDEN.get(name, b'{"signed": {"_type": "root", "version": 1}, "signatures": []}')
    match draw(st.sampled_from(["noise", "json", "bent", "cut", "flipped"])):
        case "noise":
            return name, draw(st.binary(max_size=300))
        case "json":
            return name, json.dumps(draw(values)).encode()
        case "bent" if not name.endswith(".bin") and name != "topic":
            return name, _bent(draw, json.loads(data))
        case "cut":
            return name, data[: draw(st.integers(0, len(data)))]
    bent = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        bent[draw(st.integers(0, len(bent) - 1))] = draw(st.integers(0, 255))
    return name, bytes(bent)


def _bent(draw: st.DrawFn, document: Any) -> bytes:
    """Put something made up in the place of a field, somewhere deep or not."""
    place = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return json.dumps(document).encode()
        key = draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and draw(st.booleans()):
            place = place[key]
            continue
        if isinstance(place, dict) and draw(st.booleans()):
            place[draw(st.text(max_size=10))] = place.pop(key)
        else:
            place[key] = draw(values)
        return json.dumps(document).encode()


@settings(max_examples=NUM_MESSAGES, deadline=None, suppress_health_check=list(HealthCheck))
@given(message=messages())
def test_every_message_is_read_or_refused_clearly(message: tuple[str, bytes]) -> None:
    name, data = message
    refusal: ForeshoreError | None = None
    try:
        READERS[name](data)
    except ForeshoreError as error:
        refusal = error
    assert refusal is None or (refusal.code != "internal_error" and refusal.message and refusal.remedy)
