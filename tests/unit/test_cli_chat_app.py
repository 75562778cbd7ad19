"""What ``chat`` hands to a server of its own, and when it opens the app at all."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from glmlocal.cli import chat_app, serve
from glmlocal.cli.main import _build_parser


def parsed(*words: str) -> Namespace:
    parser, _ = _build_parser()
    return parser.parse_args(["chat", *words])


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--context", "4096", "--threads", "2", "--quant", "int4", "--kv-dtype", "fp8", "--no-offload"),
        ("--gpus", "none", "--ram", "8GiB", "--nvme", "2TB@7", "--link", "pcie4x16", "--draft", "0"),
        ("--vram", "20GiB", "--cpu-offload-gb", "2.5", "--activations", "fp32"),
        ("--plan", "plan.json"),
    ],
)
def test_the_server_understands_what_chat_was_told(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLMLOCAL_HOME", str(tmp_path))
    given = parsed("some/model", *words)
    command = chat_app.server_command(given, Path("/tmp/key"))
    parser, _ = _build_parser()
    read = parser.parse_args(list(command[3:]))
    assert command[1:4] == ("-m", "glmlocal", "serve")
    assert (read.run, read.model, read.host, read.port) == (serve.run, "some/model", "127.0.0.1", 0)
    assert (read.api_key_file, read.announce) == (Path("/tmp/key"), True)
    for name, _, _ in chat_app._SERVER_WORDS:
        assert getattr(read, name) == getattr(given, name), name


def test_the_server_keeps_its_kv_between_runs_where_glmlocal_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser, _ = _build_parser()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "kv").touch()
    homes = {str(tmp_path): tmp_path / "kv", "not/absolute": None, str(tmp_path / "taken"): None}
    for home, wanted in homes.items():
        monkeypatch.setenv("GLMLOCAL_HOME", home)
        command = chat_app.server_command(parsed("demo"), Path("/tmp/key"))
        read = parser.parse_args(list(command[3:]))
        assert (read.kv_dir, read.kv_limit) == (wanted, None)  # None: the store's own limit
    assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("words", "screen", "term", "fits"),
    [
        ((), True, "xterm", True),
        (("--plain",), True, "xterm", False),
        (("--raw",), True, "xterm", False),
        ((), False, "xterm", False),
        ((), True, "dumb", False),
        ((), True, None, False),
    ],
)
def test_the_app_opens_on_a_terminal_that_can_show_it(
    words: tuple[str, ...], screen: bool, term: str | None, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_app.sys.stdout, "isatty", lambda: screen, raising=False)
    monkeypatch.delenv("TERM", raising=False)
    if term is not None:
        monkeypatch.setenv("TERM", term)
    assert chat_app.app_fits(parsed("demo", *words)) is fits


def test_the_app_imports_nothing_of_glmlocal() -> None:
    sources = (Path(__file__).parents[2] / "tui" / "glmlocal_tui").rglob("*.py")
    lines = [line for source in sources for line in source.read_text(encoding="utf-8").splitlines()]
    assert len(lines) > 1000
    assert not [
        line for line in lines if line.lstrip().startswith(("from glmlocal.", "import glmlocal.", "from glmlocal "))
    ]
