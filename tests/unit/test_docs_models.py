"""docs/models.md is what the catalogue says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "docs" / "make_models.py"


def test_tables_are_current() -> None:
    spec = importlib.util.spec_from_file_location("make_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    text = made.PAGE.read_text("utf-8")
    assert text == made.page(text), "run `python docs/make_models.py`"
    assert text.count("\n| `") == len(made.catalogue.releases())
