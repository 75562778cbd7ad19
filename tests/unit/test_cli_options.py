"""The words that every command shares."""

from __future__ import annotations

import pytest

from glmlocal.cli import options
from glmlocal.cli.main import Parser
from glmlocal.errors import ConfigError
from glmlocal.planner.plan import Wants
from glmlocal.units import GIB


def _parse(*words: str) -> Wants:
    parser = Parser(prog="test")
    options.add_machine_options(parser)
    options.add_wish_options(parser)
    return options.wishes(parser.parse_args(words))  # type: ignore[no-any-return]


def test_no_words_are_no_wishes() -> None:
    assert _parse() == Wants()


def test_every_wish_arrives() -> None:
    words = "--context 4096 --batch 2 --kv-dtype fp8 --draft 1 --vram 20GiB --cpu-offload-gb 1.5 --no-offload"
    assert _parse(*words.split()) == Wants(
        context=4096,
        batch=2,
        kv_dtype="fp8",
        draft=1,
        vram_bytes=20 * GIB,
        cpu_offload_bytes=3 * GIB // 2,
        offload=False,
    )
    assert _parse("--draft", "0").draft == 0
    assert _parse("--draft", "auto").draft is None


@pytest.mark.parametrize(
    "words",
    [
        ("--vram", "20"),
        ("--vram=-1GiB",),
        ("--cpu-offload-gb", "nan"),
        ("--cpu-offload-gb", "inf"),
        ("--cpu-offload-gb=-1",),
        ("--cpu-offload-gb", "٣"),
        ("--draft", "4"),
        ("--draft", "²"),
        ("--context", "0"),
        ("--quant", "int3"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="argument --"):
        _parse(*words)
