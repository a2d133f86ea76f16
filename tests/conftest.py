"""What all tests share."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the browser tests last.

    Playwright keeps an event loop running in the main thread from its first use to the end of the session, and no test
    after it could call `asyncio.run`.
    """
    items.sort(key=lambda item: item.get_closest_marker("browser") is not None)
