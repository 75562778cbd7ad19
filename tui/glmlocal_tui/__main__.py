"""``python -m glmlocal_tui --url URL``: the app against any OpenAI-compatible server."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from glmlocal_tui.options import Options
from glmlocal_tui.run import read_key, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m glmlocal_tui", description=__doc__)
    parser.add_argument("--url", required=True, help="the server's root, such as http://127.0.0.1:8000")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="a file whose first line is the key")
    parser.add_argument("--model", default="", metavar="NAME", help="one of the server's models (default: its first)")
    args = parser.parse_args()
    try:
        key = read_key(args.api_key_file) if args.api_key_file else ""
    except ValueError as error:
        print(f"glmlocal_tui: error: {error}", file=sys.stderr)
        return 2
    return run(Options(args.url, url=args.url, key=key, model=args.model))


if __name__ == "__main__":
    sys.exit(main())
