from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

# A shell that starts a command with `&` has it ignore Ctrl-C, and so do its children: the processes of tests must not.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _nan_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote is NaN, so that reading it shows in a result."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


@pytest.fixture(scope="session")
def shared_directory() -> Path:
    """The material beside the checkout; tests that want it are skipped where it is not."""
    directory = Path(__file__).parents[2] / "shared"
    if not directory.is_dir():
        pytest.skip(f"no {directory}")
    return directory
