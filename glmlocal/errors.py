"""Every error that glmlocal raises on purpose.

    GlmlocalError
    ├── ConfigError        a wish that cannot be met: a flag, an environment variable, a sampling value
    ├── CheckpointError    a file that is missing, damaged, hostile or of a kind that is not supported
    ├── DownloadError      something that had to be fetched could not be
    ├── PlanError          the model does not fit the machine
    ├── KernelUnavailable  an operation that this build or this machine cannot run
    ├── RequestError       a request that the engine refuses: too long, malformed, aborted
    ├── QueueFull          a request that would be served at another time
    └── EngineError        a request that was accepted and could not be served: a fault of ours or of the machine

A message says what was wanted, what was found, and what to do next, in one line. The command line prints it and
exits with 2; a traceback is shown only under ``--debug``.
"""

from __future__ import annotations


class GlmlocalError(Exception):
    """Base of all errors that carry a message for the user."""


class ConfigError(GlmlocalError):
    """A flag, environment variable or sampling value is not usable."""


class CheckpointError(GlmlocalError):
    """A model file is missing, damaged, hostile or unsupported."""


class DownloadError(GlmlocalError):
    """A file could not be fetched, verified or stored."""


class PlanError(GlmlocalError):
    """The model does not fit the machine."""


class KernelUnavailable(GlmlocalError):
    """An operation cannot run with this build or on this machine."""


class RequestError(GlmlocalError):
    """A request cannot be served as it stands."""


class QueueFull(GlmlocalError):
    """Too many requests wait already. ``retry_after_s`` is when a place should be free."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineError(GlmlocalError):
    """A step failed, or the engine is gone; the request is not at fault."""
