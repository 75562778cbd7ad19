"""``chat`` as the terminal app: when it opens, and what it is started with. The app itself is ``glmlocal_tui``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from glmlocal.cli.pull import offer_to_pull
from glmlocal.errors import ConfigError

_OF_THE_APP = ("temperature", "top_p", "max_tokens")  # sampling that the app can change while it runs
_SERVER_WORDS = (
    ("context", "--context", None),
    ("threads", "--threads", None),
    ("quant", "--quant", "keep"),
    ("activations", "--activations", "auto"),
    ("kv_dtype", "--kv-dtype", "auto"),
    ("draft", "--draft", None),
    ("gpus", "--gpus", "auto"),
    ("ram", "--ram", None),
    ("nvme", "--nvme", None),
    ("nvme_dir", "--nvme-dir", None),
    ("link", "--link", None),
    ("vram", "--vram", None),
    ("cpu_offload_gb", "--cpu-offload-gb", None),
    ("no_offload", "--no-offload", False),
    ("plan", "--plan", None),
)  # field, option, default: what a server of our own is given as it was given to us


def add_server_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--url", metavar="URL", help="talk to this OpenAI-compatible server instead of starting one")
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="its key: the first line of FILE")


def app_fits(args: argparse.Namespace) -> bool:
    """Does a conversation on a terminal open the app? Not for what only the plain mode has, or on a dumb terminal."""
    plain = args.plain or args.raw or args.json
    return not plain and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def run_app(args: argparse.Namespace, sampling: dict[str, Any], system: str | None, *, interactive: bool) -> int:
    """Open the app. Raises ConfigError for options that do not go together, before anything is started."""
    if args.url is not None:
        _check_url(args, interactive=interactive)
    from glmlocal_tui.client import Sampling
    from glmlocal_tui.options import Options
    from glmlocal_tui.run import read_key, run

    options: dict[str, Any] = {
        "system": system,
        "sampling": Sampling(
            **{name: sampling[name] for name in _OF_THE_APP if name in sampling},
            thinking=False if args.no_think else None,
            extra=tuple((name, value) for name, value in sampling.items() if name not in _OF_THE_APP),
        ),
        **_places(),
    }
    if args.url is not None:
        try:
            key = read_key(args.api_key_file) if args.api_key_file else ""
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return run(Options(args.url, url=args.url, key=key, model=args.model or "", **options))
    if args.model is None:
        raise ConfigError(
            "the following arguments are required: MODEL, or --url of a server; see `glmlocal chat --help`"
        )
    if args.api_key_file is not None:
        raise ConfigError("--api-key-file goes with --url; leave it out")
    offer_to_pull(args)
    import secrets
    import tempfile

    with tempfile.TemporaryDirectory(prefix="glmlocal-chat-") as directory:
        key, key_file = secrets.token_urlsafe(32), Path(directory) / "key"
        key_file.touch(0o600)
        key_file.write_text(key + "\n")
        return run(Options(args.model, key=key, command=server_command(args, key_file), **options))


def server_command(args: argparse.Namespace, key_file: Path) -> tuple[str, ...]:
    """The ``serve`` child: on a free loopback port, with a key of its own, and with our engine options as given."""
    words = [sys.executable, "-m", "glmlocal", "serve", args.model, "--host", "127.0.0.1", "--port", "0"]
    words += ["--api-key-file", str(key_file), "--announce", *_kept_kv()]
    for name, option, default in _SERVER_WORDS:
        value = getattr(args, name)
        if value is True and default is False:
            words.append(option)
        elif value != default:
            words.append(f"{option}={_as_typed(name, value)}")
    return tuple(words)


def _kept_kv() -> list[str]:
    """Where the server keeps the KV of long prompts, so that a resumed conversation is not computed again; the store's
    own limit bounds it. Nothing where that place cannot be written: the chat is worth more than its cache."""
    from glmlocal.paths import cache_home

    try:
        directory = cache_home() / "kv"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (ConfigError, OSError):
        return []
    return ["--kv-dir", str(directory)] if os.access(directory, os.W_OK | os.X_OK) else []


def _as_typed(name: str, value: Any) -> str:
    """An option's value as a word that reads back to it."""
    from glmlocal.units import GIB, KIB

    if name == "cpu_offload_gb":
        return repr(value / GIB)
    return f"{value / KIB:.9f}KiB" if name == "vram" else str(value)


def _check_url(args: argparse.Namespace, *, interactive: bool) -> None:
    if not args.url.startswith(("http://", "https://")):
        raise ConfigError(f"--url is {args.url!r}; give the server's root, such as http://127.0.0.1:8000")
    if not interactive or not sys.stdout.isatty():
        raise ConfigError("--url opens the terminal app, which needs a terminal; without one, use curl or a client")
    if os.environ.get("TERM", "dumb") == "dumb":
        raise ConfigError(
            "--url opens the terminal app, which TERM=dumb cannot show; set TERM to what your terminal is, such as "
            "TERM=xterm-256color"
        )
    for name in ("plain", "raw", "json"):
        if getattr(args, name):
            raise ConfigError(f"--{name} runs the model in this process and takes no --url; leave one of them out")
    given = [option for name, option, default in _SERVER_WORDS if getattr(args, name) != default]
    if given:
        raise ConfigError(f"{given[0]} is decided by the server at --url; leave it out")


def _places() -> dict[str, Path]:
    """Where the app keeps things: under GLMLOCAL_HOME if it is set, else its own platform directories."""
    from glmlocal.paths import HOME_VARIABLE, cache_home

    if not os.environ.get(HOME_VARIABLE):
        return {}
    home = cache_home() / "chat"
    return {"data_dir": home, "settings_path": home / "settings.json"}
