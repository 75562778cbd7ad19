"""An engine client over a tiny model, for tests: prompts in, tokens out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from glmlocal.engine.client import ClientOptions, LocalEngineClient
from glmlocal.engine.engine import Engine
from glmlocal.engine.request import Request, RequestOutput, SamplingParams


@dataclass(frozen=True, slots=True)
class Answer:
    token_ids: list[int]
    last: RequestOutput


@asynccontextmanager
async def running(engine: Engine, options: ClientOptions | None = None) -> AsyncIterator[LocalEngineClient]:
    client = LocalEngineClient(engine, options or ClientOptions())
    await client.start()
    try:
        yield client
    finally:
        await client.aclose()


def request(name: str, token_ids: Sequence[int], *, client_id: str = "", **params: Any) -> Request:
    """Greedy, 12 tokens and no EOS unless said otherwise."""
    given = {"temperature": 0, "max_tokens": 12, **params}
    return Request(name, tuple(token_ids), SamplingParams.from_dict(given), client_id=client_id)


async def answer(client: LocalEngineClient, wanted: Request) -> Answer:
    token_ids: list[int] = []
    output = None
    async for output in client.submit(wanted):
        token_ids += output.token_ids
    assert output is not None
    return Answer(token_ids, output)


async def until(condition: Any, seconds: float = 30.0) -> None:
    """Wait for something that another thread is about to do."""
    for _ in range(int(seconds / 0.005)):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen")
