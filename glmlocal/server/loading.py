"""MODEL and options → a model that answers. Runs on a thread of its own, behind an open port."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmlocal.server.model import LoadProgress, ModelFacts, ServedModel

# Loads on a thread, and returns what makes the model answer, which wants the event loop.
Loader = Callable[[LoadProgress], Callable[[], Awaitable[ServedModel]]]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What the command line says of the model; ``engine`` are LLM's arguments."""

    model: str
    context: int | None = None
    batch: int = 8
    max_waiting: int = 64
    engine: Mapping[str, Any] = field(default_factory=dict)
    kv_dir: Path | None = None
    kv_limit_bytes: int | None = None


def load(options: LoadOptions, progress: LoadProgress) -> Callable[[], Awaitable[ServedModel]]:
    """Read the model. Raises what LLM raises. The returned function starts the engine."""
    from glmlocal.engine.client import ClientOptions, LocalEngineClient
    from glmlocal.llm import LLM

    llm = LLM(
        options.model,
        context=options.context,
        max_batch=options.batch,
        on_bytes=progress.report,
        **options.engine,
    )
    facts = facts_of(llm)

    async def start() -> ServedModel:
        client = LocalEngineClient(llm.engine, ClientOptions(max_waiting=options.max_waiting))
        await client.start()
        return ServedModel(facts, llm.text, client)

    return start


def facts_of(llm: Any) -> ModelFacts:
    """Of a loaded ``LLM``."""
    run = llm.plan.resolved
    return ModelFacts(
        name=llm.model_name,
        context=llm.context,
        quant=run.quant,
        kv_dtype=run.kv_dtype,
        mtp_drafts=run.num_drafts,
        plan={"devices": [_device(device) for device in llm.plan.devices]},
    )


def _device(device: Any) -> dict[str, Any]:
    """A ledger of the plan: ``planner.plan.Device``."""
    return {
        "name": device.name,
        "kind": device.kind,
        "capacity_bytes": device.capacity_bytes,
        "used_bytes": device.used_bytes,
        "lines": [{"what": line.what, "bytes": line.nbytes, "basis": line.basis} for line in device.lines],
    }
