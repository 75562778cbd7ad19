from __future__ import annotations

import json
import struct
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from glmlocal.errors import CheckpointError, ConfigError
from glmlocal.evaluate import compare_rows, log_softmax
from glmlocal.formats import logits_file
from glmlocal.formats.logits_file import LogitsHeader, LogitsWriter, open_logits

HEADER = LogitsHeader("a model", num_tokens=6, vocab_size=40, context=4, stride=2, vocabulary="digest")
TOKENS = np.array([0, 39, 3, 7, 7, 1], np.int32)


def random_log_probs(seed: int = 0, scale: float = 6.0) -> NDArray[np.float64]:
    return log_softmax((np.random.default_rng(seed).normal(size=(5, 40)) * scale).astype(np.float32))


def save(path: Path, log_probs: NDArray[np.float64]) -> Path:
    with LogitsWriter(path, HEADER, TOKENS) as writer:
        writer.write(log_probs[:2])
        writer.write(log_probs[2:])
    return path


def test_round_trip(tmp_path: Path) -> None:
    log_probs = random_log_probs()
    saved = open_logits(save(tmp_path / "x.logits", log_probs))
    assert saved.header == HEADER
    np.testing.assert_array_equal(saved.token_ids, TOKENS)
    rows = saved.rows(1, 4)
    np.testing.assert_allclose(rows, log_probs[1:4], rtol=2**-10, atol=1e-3)
    np.testing.assert_allclose(np.exp(rows).sum(axis=1), 1, rtol=1e-14)
    assert [p.name for p in tmp_path.iterdir()] == ["x.logits"]


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 20))
def test_rounding_costs_far_less_than_any_quantization(seed: int, scale: float) -> None:
    log_probs = random_log_probs(seed, scale)
    rounded = log_softmax(log_probs.astype(np.float16).astype(np.float32))
    assert compare_rows(log_probs, rounded, np.zeros(5, np.int64)).kl.max() < 2e-6


def test_probabilities_below_fp16_are_clipped_not_infinite(tmp_path: Path) -> None:
    log_probs = np.full((5, 40), -1e6)
    log_probs[:, 3] = 0.0
    rows = open_logits(save(tmp_path / "x", log_probs)).rows(0, 5)
    assert rows.min() == -65504
    assert (rows[:, 3] == 0).all()


def test_an_existing_file_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="exists; choose another name"):
        save(path, random_log_probs())
    assert path.read_text() == "mine"


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, HEADER.data_bytes))
    with pytest.raises(ConfigError, match=r"take 424 B but the disk of '.*' has 424 B free"):
        save(tmp_path / "x", random_log_probs())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_at_the_end_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logits_file.os, failing, full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path / "x", random_log_probs())
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with LogitsWriter(tmp_path / "x", HEADER, TOKENS) as writer:
            writer.write(random_log_probs()[:2])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def with_header(data: bytes, **changes: Any) -> bytes:
    """The file with other header values."""
    (length,) = struct.unpack("<Q", data[8:16])
    text = json.dumps({**json.loads(data[16 : 16 + length]), **changes}).encode()
    return data[:8] + struct.pack("<Q", len(text)) + text + data[16 + length :]


@pytest.fixture
def good(tmp_path: Path) -> bytes:
    return save(tmp_path / "good", random_log_probs()).read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: b"", "not written by --save-logits"),
        (lambda d: d[:12], "not written by --save-logits"),
        (lambda d: b"GGUF" + d[4:], "not written by --save-logits"),
        (
            lambda d: d[:8] + struct.pack("<Q", 2**63) + d[16:],
            "announces a header of 9,223,372,036,854,775,808 bytes but has",
        ),
        (lambda d: d[:8] + struct.pack("<Q", len(d)) + d[16:], "announces a header"),
        (lambda d: d[:8] + struct.pack("<Q", 0) + d[16:], "damaged header"),
        (lambda d: d[:16] + b"[" * 100 + d[116:], "damaged header"),
        (lambda d: d[:16] + b"\xff" + d[17:], "damaged header"),
        (lambda d: d[:-1], "its header describes"),
        (lambda d: d + b"\0", "its header describes"),
        (lambda d: with_header(d, num_tokens=2**31), "its header describes"),
        (lambda d: with_header(d, num_tokens=-1), "num_tokens is -1"),
        (lambda d: with_header(d, num_tokens=1), "num_tokens is 1"),
        (lambda d: with_header(d, num_tokens=True), "num_tokens is True"),
        (lambda d: with_header(d, vocab_size=10**30), "vocab_size is 1000000000"),
        (lambda d: with_header(d, stride=0.5), "stride is 0.5"),
        (lambda d: with_header(d, model=3), "model is not a text"),
        (lambda d: with_header(d, x=1), "not those of this version"),
        (lambda d: d.replace(TOKENS.tobytes(), np.array([0, 40, 3, 7, 7, 1], "<i4").tobytes()), "token ids outside"),
        (lambda d: d.replace(TOKENS.tobytes(), np.array([0, -1, 3, 7, 7, 1], "<i4").tobytes()), "token ids outside"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, good: bytes, damage: Any, message: str) -> None:
    path = tmp_path / "bad"
    path.write_bytes(damage(good))
    with pytest.raises(CheckpointError, match=message):
        open_logits(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_numbers_are_refused(tmp_path: Path, good: bytes, value: float) -> None:
    path = tmp_path / "bad"
    path.write_bytes(good[:-2] + np.float16(value).tobytes())
    saved = open_logits(path)
    saved.rows(0, 4)
    with pytest.raises(CheckpointError, match="rows 4 to 4"):
        saved.rows(4, 5)
