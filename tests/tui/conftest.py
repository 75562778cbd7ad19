from __future__ import annotations

from collections.abc import Iterator

import pytest

from tui.scripted_server import ScriptedServer, scripted, stats


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A server like ours, ready at once."""
    with scripted(stats=stats()) as running:
        yield running
