"""``python -m glmlocal`` is ``glmlocal``."""

from __future__ import annotations

from glmlocal.cli.main import main

raise SystemExit(main())
