"""What all tests share."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long tests and end with the browser's.

    Playwright keeps an event loop running in the main thread from its first use to the end of the session, and no test
    after it could call `asyncio.run`.
    """
    items.sort(key=lambda item: (item.get_closest_marker("browser") is not None, _is_short(item)))


def _is_short(item: pytest.Item) -> bool:
    return item.get_closest_marker("long") is None
