"""What the app imports, and when: nothing heavy before the first paint, and then not where keys would wait for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """if True:
    import asyncio, sys, threading
    from pathlib import Path
    HEAVY = {"httpx", "markdown_it", "rich.markdown", "rich.syntax"}
    where = {}
    class Watch:
        def find_spec(self, name, path=None, target=None):
            if name in HEAVY:
                where.setdefault(name, threading.current_thread() is threading.main_thread())
    sys.meta_path.insert(0, Watch())
    from tui.driving import running
    from tui.scripted_server import scripted, stats
    from glmlocal_tui.app import ChatApp
    assert not HEAVY & set(sys.modules), HEAVY & set(sys.modules)
    async def main():
        with scripted(stats=stats()) as server:
            async with running(Path(sys.argv[1]), server.url) as app:
                await app.wait("ready: ask something")
                await app.wait(lambda: HEAVY <= set(sys.modules))
                await app.say("hi")
                await app.wait("Hello.")
    asyncio.run(main())
    assert where == dict.fromkeys(HEAVY, False), where
"""


def test_heavy_imports_come_after_the_first_paint_and_in_a_thread(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    code = f"import sys; sys.path.insert(0, {str(tests)!r})\n{SCRIPT}"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
