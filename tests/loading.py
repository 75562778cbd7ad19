"""Engines for tests, planned as ``LLM`` plans them."""

from __future__ import annotations

from typing import Any

from glmlocal.engine import loader
from glmlocal.engine.engine import Engine
from glmlocal.engine.planning import plan_here
from glmlocal.formats.index import Checkpoint
from glmlocal.planner.plan import Wants


def load_engine(checkpoint: Checkpoint, *, quant: str = "keep", max_batch: int = 8, **wants: Any) -> Engine:
    """``wants`` are fields of ``Wants``: context, kv_dtype, activations, draft …"""
    return loader.load_engine(checkpoint, plan_here(checkpoint, quant, Wants(batch=max_batch, **wants)))
