"""The main screens, cells and colours, as SVG. ``UPDATE_SNAPSHOTS=1 pytest tests/tui`` writes them anew."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tui.driving import Driver, running
from tui.scripted_server import ScriptedServer, finish, stats, text, think, tool, usage

pytestmark = pytest.mark.anyio
SNAPSHOTS = Path(__file__).parent / "snapshots"
SIZES = [(80, 24), (140, 40)]
ANSWER = """A **mixture of experts** routes each token to a few `experts`:

1. the router scores them
2. the best *eight* run

```python
scores = router(x).topk(8)
```

| 模型 | experts |
|------|--------:|
| GLM-4.5-Air | 128 |

> 混合专家模型只激活一部分参数。
"""


async def start(driver: Driver, server: ScriptedServer) -> None:
    await driver.wait("60%")


async def conversation(driver: Driver, server: ScriptedServer) -> None:
    server.stats = stats()
    await driver.wait("ready: ask")
    await driver.say("What is a mixture of experts? 请用中文总结。")
    await driver.wait("12 + 34 tokens")


async def dashboard(driver: Driver, server: ScriptedServer) -> None:
    await conversation(driver, server)
    await driver.press("f4")
    await driver.wait("KV cache")


async def help_screen(driver: Driver, server: ScriptedServer) -> None:
    await driver.press("f1")
    await driver.wait("keys and commands")


SCREENS: dict[str, Callable[[Driver, ScriptedServer], Awaitable[None]]] = {
    "start": start,
    "conversation": conversation,
    "dashboard": dashboard,
    "help": help_screen,
}


async def test_the_picture_in_the_docs_is_the_screen_as_it_is() -> None:
    picture = Path(__file__).parents[2] / "docs" / "chat.svg"
    assert picture.read_text(encoding="utf-8") == (SNAPSHOTS / "dashboard_140x40.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("size", SIZES, ids=[f"{width}x{height}" for width, height in SIZES])
@pytest.mark.parametrize("name", SCREENS)
async def test_screen_is_as_it_was(tmp_path: Path, server: ScriptedServer, name: str, size: tuple[int, int]) -> None:
    loading = {"done_bytes": 12 << 30, "total_bytes": 20 << 30, "eta_s": 9.0, "tier": "ram"}
    server.stats = stats("loading", loading=loading)
    server.script([think("Short and clear."), text(ANSWER), tool(0, "lookup", '{"q": "MoE"}'), finish(), usage()])

    async with running(tmp_path, server.url, size=size) as driver:
        from glmlocal_tui.widgets.dashboard import Dashboard
        from glmlocal_tui.widgets.prompt import Prompt
        from glmlocal_tui.widgets.thinking import Thinking

        # What differs from run to run is not looked at: the curve's points, the cursor, the time of thinking.
        driver.app.query_one(Dashboard).tick = lambda rate: None  # type: ignore[method-assign]
        driver.app.query_one(Prompt).cursor_blink = False
        await driver.wait("60%")
        await SCREENS[name](driver, server)
        await driver.wait(lambda: driver.app.answering is None)
        for thinking in driver.app.query(Thinking):
            thinking.title = "Thought for 0.1 s"
        driver.app.screen.set_focus(None)
        driver.app.update_status()
        await driver.pilot.pause(0.2)
        found = driver.app.export_screenshot(simplify=True)
    path = SNAPSHOTS / f"{name}_{size[0]}x{size[1]}.svg"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(found, encoding="utf-8")
    assert path.exists(), "UPDATE_SNAPSHOTS=1 writes it"
    if found != path.read_text(encoding="utf-8"):
        (tmp_path / path.name).write_text(found, encoding="utf-8")
        pytest.fail(f"the screen differs from {path}; see {tmp_path / path.name}")
