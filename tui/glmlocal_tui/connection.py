"""How the server is doing: started if it is ours to start, asked every second, lost and found again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from glmlocal_tui.client import BUSY, GONE, LOADING, ODD, REFUSED, Client, ServerError
from glmlocal_tui.server_process import ServerProcess, StartError
from glmlocal_tui.stats import Stats

STARTING, LOADS, READY, FAILED, LOST, NO_KEY = "starting", "loading", "ready", "error", "gone", "refused"
_ASK_LOADING_S, _ASK_READY_S, _ASK_FOREIGN_S, _MOST_BACKOFF_S = 0.25, 1.0, 30.0, 5.0


@dataclass(frozen=True, slots=True)
class ServerState:
    """What is known of the server now. ``phase`` is one of the words above, ``problem`` a sentence for the screen."""

    phase: str = STARTING
    problem: str = ""
    models: tuple[str, ...] = ()
    stats: Stats | None = None  # None: another kind of server, or nothing known yet

    @property
    def context(self) -> int:
        """Tokens; 0: unknown."""
        return self.stats.model.context if self.stats else 0


class Connection:
    """Asks until cancelled, and tells ``changed`` every new state."""

    def __init__(self, client: Client, process: ServerProcess | None, changed: Callable[[ServerState], object]) -> None:
        self._client, self._process, self._changed = client, process, changed
        self.state = ServerState()
        self._hurry = asyncio.Event()
        self._quiet_until_s = 0.0
        self._restarts = False

    async def run(self) -> None:
        if self._process is not None and not await self._start(self._process):
            await self._wait_for_restart()
        misses = 0
        while True:
            state = await self._ask()
            misses = misses + 1 if state.phase == LOST else 0
            self._tell(state)
            process = self._process
            if process is not None and process.exit_code is not None:
                words = process.last_words()
                problem = f"the server has ended (exit code {process.exit_code}): {words} · /restart starts it again"
                self._tell(replace(state, phase=LOST, problem=problem))
                await self._wait_for_restart()
                continue
            await self._pause(self._delay(state, misses))

    def be_quiet(self, duration_s: float) -> None:
        """Ask nothing for a moment."""
        self._quiet_until_s = time.monotonic() + duration_s

    def hurry(self) -> None:
        """Ask now: an answer has failed, or the user is waiting."""
        self._hurry.set()

    def restart(self) -> bool:
        """Start our own server again after its end; False: it is not ours, or it runs."""
        if self._process is None or self.state.phase not in (LOST, FAILED):
            return False
        self._restarts = True
        self._hurry.set()
        return True

    async def _start(self, process: ServerProcess) -> bool:
        self._tell(ServerState())
        try:
            url = await process.start()
        except StartError as error:
            self._tell(ServerState(FAILED, f"{error} · /restart tries again"))
            return False
        await self._client.aclose()
        self._client.url = url
        return True

    async def _wait_for_restart(self) -> None:
        assert self._process is not None
        started = False
        while not started:
            self._restarts = False
            while not self._restarts:
                self._hurry.clear()
                await self._hurry.wait()
            await self._process.stop(0.5)
            self._process = self._process.again()
            started = await self._start(self._process)

    async def _ask(self) -> ServerState:
        old = self.state
        try:
            stats = await self._client.stats()
            if stats is None:
                return ServerState(READY, "", tuple(await self._client.models()))
        except ServerError as error:
            if self._client.ours is False:
                if error.kind in (ODD, BUSY):  # it lists no models, and may answer all the same
                    return ServerState(READY, "", old.models)
                self._client.ours = None  # who comes back may be another one
            phases = {GONE: LOST, REFUSED: NO_KEY, LOADING: LOADS}
            return replace(old, phase=phases.get(error.kind, LOST), problem=str(error))
        phase = {"loading": LOADS, "ready": READY, "error": FAILED}[stats.state]
        models = old.models
        if phase == READY and (not models or old.phase != READY):
            with contextlib.suppress(ServerError):
                models = tuple(await self._client.models())
            models = models or ((stats.model.name,) if stats.model.name else ())
        return ServerState(phase, stats.error, models, stats)

    def _delay(self, state: ServerState, misses: int) -> float:
        if misses:
            return min(0.5 * 2.0 ** min(misses - 1, 10), _MOST_BACKOFF_S)
        if state.phase == LOADS:
            return _ASK_LOADING_S
        return _ASK_READY_S if state.stats is not None else _ASK_FOREIGN_S

    async def _pause(self, delay_s: float) -> None:
        self._hurry.clear()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), delay_s)
        while not self._hurry.is_set() and (left_s := self._quiet_until_s - time.monotonic()) > 0:
            await asyncio.sleep(left_s)

    def _tell(self, state: ServerState) -> None:
        self.state = state
        self._changed(state)

    async def aclose(self) -> None:
        await self._client.aclose()
        if self._process is not None:
            await self._process.stop()
