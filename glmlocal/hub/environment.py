"""What huggingface_hub makes of its environment variables, for whatever here must agree with it."""

from __future__ import annotations

import os
from dataclasses import replace
from types import ModuleType

from glmlocal.errors import ConfigError
from glmlocal.hub.http import Patience
from glmlocal.text.files import one_line


def constants() -> ModuleType:
    """huggingface_hub's constants. Raises ConfigError for a variable that it cannot read."""
    try:
        from huggingface_hub import constants
    except ValueError as error:  # a number of seconds that is none
        wrong = [f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith("HF_")]
        raise ConfigError(f"huggingface_hub cannot use {', '.join(wrong)}: {one_line(error)}") from None
    return constants


def patient_as_told(patience: Patience) -> Patience:
    """With the seconds of HF_HUB_DOWNLOAD_TIMEOUT and HF_HUB_ETAG_TIMEOUT where a person set them."""
    known = constants()
    if "HF_HUB_DOWNLOAD_TIMEOUT" in os.environ:  # for the next bytes
        patience = replace(patience, read_s=float(known.HF_HUB_DOWNLOAD_TIMEOUT))
    if "HF_HUB_ETAG_TIMEOUT" in os.environ:  # for an answer at all
        patience = replace(patience, connect_s=float(known.HF_HUB_ETAG_TIMEOUT))
    return patience
