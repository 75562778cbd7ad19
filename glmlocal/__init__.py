"""Run GLM-4.5-class mixture-of-experts models on the machine you own.

from glmlocal import LLM
with LLM("demo") as llm:
    print(llm.chat([{"role": "user", "content": "What is the capital of France?"}]).text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glmlocal.completion import Completion, CompletionDelta
    from glmlocal.engine.request import SamplingParams
    from glmlocal.llm import LLM

__all__ = ["LLM", "Completion", "CompletionDelta", "SamplingParams", "__version__"]
__version__ = "0.1.0"

_HOME = {
    "LLM": "glmlocal.llm",
    "Completion": "glmlocal.completion",
    "CompletionDelta": "glmlocal.completion",
    "SamplingParams": "glmlocal.engine.request",
}


def __getattr__(name: str) -> Any:
    """Import on first use: ``import glmlocal`` alone stays fast and leaves torch unloaded."""
    if name not in _HOME:
        raise AttributeError(f"module 'glmlocal' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
