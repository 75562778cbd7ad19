"""``glmlocal serve MODEL``: an OpenAI- and Anthropic-compatible server over one model.

The port is open at once; the model is loaded behind it. Logs go to stderr. With ``--announce`` stdout gets one JSON
line, {"url", "pid"}, as soon as the port is open, and the server ends when its stdin does.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import shlex
import shutil
import socket
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmlocal.cli.options import a_size, add_engine_options, add_plan_option, at_least, planned, tokens, wishes
from glmlocal.cli.pull import offer_to_pull
from glmlocal.errors import ConfigError

if TYPE_CHECKING:
    from glmlocal.server.guard import Door

_MAX_KEY_FILE_BYTES = 1 << 20
_EPILOG = """\
examples:
  glmlocal serve demo                                     http://127.0.0.1:8000, no key needed
  glmlocal serve GLM-4.5-Air --host 0.0.0.0 --api-key-file keys.txt
  curl http://127.0.0.1:8000/v1/models

docs/clients.md has settings for Claude Code, Codex, OpenCode, Open WebUI and others.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="answer OpenAI and Anthropic clients over HTTP",
        description="Serve MODEL over HTTP: OpenAI's chat, completions and responses APIs and Anthropic's messages.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint directory, a .gguf file, a pulled name, or demo")
    parser.add_argument("--context", type=tokens, metavar="N", help="tokens for prompt and answer together: 32K")
    parser.add_argument("--batch", type=at_least(1), default=8, metavar="N", help="answers at a time (default: 8)")
    parser.add_argument(
        "--max-waiting", type=at_least(0), default=64, metavar="N", help="requests that may wait (default: 64)"
    )
    parser.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="what clients call the model (repeatable; default: MODEL's own name)",
    )
    parser.add_argument(
        "--engine", choices=("vllm", "sglang"), help="run this engine instead, with the command of `glmlocal plan`"
    )
    listen = parser.add_argument_group("network")
    listen.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    listen.add_argument("--port", type=_port, default=8000, metavar="N", help="0: any free one (default: 8000)")
    listen.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys that are let in, one per line")
    listen.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name clients reach this server by"
    )
    listen.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="web pages that may use it: https://chat.example",
    )
    listen.add_argument("--ssl-certfile", type=Path, metavar="FILE", help="certificate, for https")
    listen.add_argument("--ssl-keyfile", type=Path, metavar="FILE", help="its private key")
    listen.add_argument("--announce", action="store_true", help="print {url, pid} as JSON and end with stdin")
    keep = parser.add_argument_group("conversations on disk")
    keep.add_argument(
        "--kv-dir", type=Path, metavar="DIR", help="keep the KV of long prompts there, for the next start"
    )
    keep.add_argument("--kv-limit", type=a_size, metavar="SIZE", help="and no more than this: 20GiB")
    add_plan_option(parser)
    add_engine_options(parser)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6 and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"wanted a port from 0 to 65535, found {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    door_of_network(args)  # mistakes first, before anything is fetched
    if args.engine:
        return _hand_over(args)
    options = planned(args, context=None, batch=8)
    if not args.announce:
        offer_to_pull(args)
        options = planned(args, context=None, batch=8)  # of a release that was chosen just now, --quant too
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for name in ("uvicorn.error", "glmlocal.engine.loader"):
        logging.getLogger(name).setLevel(logging.WARNING)

    from functools import partial

    from glmlocal.server import loading, process
    from glmlocal.server.app import create_app
    from glmlocal.server.model import ServerState

    names = tuple(dict.fromkeys(args.served_model_name or [_own_name(args.model)]))
    state = ServerState(str(args.model), names)
    load_options = loading.LoadOptions(
        args.model, args.context, args.batch, args.max_waiting, options, args.kv_dir, args.kv_limit
    )
    listen = process.Listen(args.host, args.port, args.ssl_certfile, args.ssl_keyfile, args.announce)
    app = create_app(state, door_of_network(args))
    return process.serve(app, state, partial(loading.load, load_options), listen)


def _own_name(model: str) -> str:
    """``zai-org/GLM-4.5-Air`` and ``/models/GLM-4.5-Air/`` are GLM-4.5-Air."""
    return Path(model).name.removesuffix(".gguf") or str(model)


def door_of_network(args: argparse.Namespace) -> Door:
    """Who is let in. Raises ConfigError for options that would let in everybody, or nobody."""
    from glmlocal.server.guard import Door, host_name

    keys = _keys(args.api_key_file)
    if not _is_loopback(args.host) and not keys:
        raise ConfigError(
            f"--host {args.host} can be reached by others, which needs --api-key-file FILE "
            "(one key per line; `openssl rand -hex 16` makes one)"
        )
    if args.kv_limit is not None and args.kv_dir is None:
        raise ConfigError("--kv-limit is about --kv-dir DIR; give that too, or leave it out")
    if (args.ssl_certfile is None) != (args.ssl_keyfile is None):
        raise ConfigError("--ssl-certfile and --ssl-keyfile belong together; give both, or neither")
    for origin in args.allow_origin:
        scheme, found, rest = origin.partition("://")
        if scheme not in ("http", "https") or not found or not rest or "/" in rest:
            raise ConfigError(f"--allow-origin is {origin!r}, wanted an origin such as https://chat.example")
    hosts = {host_name(name) for name in (args.host, socket.gethostname(), *args.allow_host)}
    return Door(keys=keys, hosts=frozenset(hosts), origins=frozenset(args.allow_origin))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise ConfigError(
            f"--host is {host!r}, wanted an address of this machine such as 127.0.0.1 or 0.0.0.0"
        ) from None


def _keys(path: Path | None) -> tuple[str, ...]:
    """The keys of the file. Raises ConfigError: none in it, or a file that others can read."""
    if path is None:
        return ()
    from glmlocal.server.guard import read_keys

    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read --api-key-file {str(path)!r}: {error.strerror or error}") from error
    if stat.S_ISREG(mode) and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"--api-key-file {str(path)!r} can be read by others; `chmod 600` it")
    try:
        keys = read_keys(data.decode("ascii").splitlines())
    except UnicodeDecodeError:
        raise ConfigError(f"--api-key-file {str(path)!r} holds keys that are not plain ASCII") from None
    if not keys or len(data) > _MAX_KEY_FILE_BYTES:
        raise ConfigError(f"--api-key-file {str(path)!r} holds no key; write one per line")
    return keys


def _hand_over(args: argparse.Namespace) -> int:
    """Become the other engine. Raises ConfigError, with the command, where it is not installed."""
    from importlib.util import find_spec

    from glmlocal.cli.plan import hand_over
    from glmlocal.planner.probe import machine

    there = machine(args.gpus, args.ram, args.nvme, args.link)
    text = hand_over(args.model, args.engine, there, wishes(args))
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    words += ["--host", args.host, "--port", str(args.port)]
    command = shlex.join(words)
    if "HEAD_ADDRESS" in command:
        raise ConfigError(f"this takes several machines, which are started by hand: {command}")
    installed = shutil.which("vllm") if args.engine == "vllm" else find_spec("sglang") and sys.executable
    if not installed:
        raise ConfigError(f"{args.engine} is not installed here; `pip install {args.engine}`, or run: {command}")
    environment = {**os.environ, **({"VLLM_API_KEY": keys[0]} if (keys := _keys(args.api_key_file)) else {})}
    if args.engine == "sglang" and keys:
        words += ["--api-key", keys[0]]
    print(command, file=sys.stderr, flush=True)
    os.execvpe(installed, [installed, *words[1:]], environment)
