"""A prefix that is found in the cache gives the same logits as one that is computed, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from glmlocal.engine.engine import Engine
from glmlocal.engine.request import Request, SamplingParams
from glmlocal.formats.index import Checkpoint, open_checkpoint
from glmlocal.kernels import cpu
from loading import load_engine

pytestmark = pytest.mark.skipif(not cpu.available, reason="the plain kernels promise no bits")
TOKENS = torch.randint(0, 380, (3, 150), generator=torch.Generator().manual_seed(11)).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    directory: Path = tiny.save(tiny.build_model(**tiny.CONFIGS["glm45"]), tmp_path_factory.mktemp("prefix"))
    opened = open_checkpoint(directory)
    yield opened
    opened.tensors.close()


def logits_of(engine: Engine, requests: list[Request]) -> dict[tuple[str, int], torch.Tensor]:
    """Logits that tokens were chosen from, by request and position; requests come one per step."""
    seen: dict[tuple[str, int], torch.Tensor] = {}
    run, arriving = engine.runner.run, list(requests)

    def recording(batch: Any, is_cancelled: Any) -> torch.Tensor:
        logits = run(batch, is_cancelled)
        sampled = [item for item in batch.requests if item.needs_sample]
        for row, item in zip(logits, sampled, strict=True):
            position = item.start + len(item.token_ids)
            previous = seen.setdefault((item.request.request_id, position), row.clone())
            assert torch.equal(previous, row)
        return logits

    engine.runner.run = recording  # type: ignore[method-assign]
    while arriving or engine.has_work:
        if arriving:
            engine.add(arriving.pop(0))
        engine.step()
        engine.scheduler.check_integrity()
    engine.runner.run = run  # type: ignore[method-assign]
    return seen


prompts = st.tuples(st.integers(0, 2), st.integers(1, 150), st.integers(0, 40)).map(
    lambda cut: [*TOKENS[cut[0]][: cut[1]], *TOKENS[(cut[0] + 1) % 3][: cut[2]]]
)


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8"])
@settings(max_examples=12, deadline=None)
@given(
    conversations=st.lists(prompts, min_size=1, max_size=6),
    num_blocks=st.integers(7, 20),
    budget=st.integers(3, 100),
    max_batch=st.integers(1, 4),
)
def test_a_hit_never_changes_logits(
    checkpoint: Checkpoint,
    kv_dtype: str,
    conversations: list[list[int]],
    num_blocks: int,
    budget: int,
    max_batch: int,
) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    requests = [Request(str(i), tuple(tokens), params) for i, tokens in enumerate(conversations)]
    engine = load_engine(checkpoint, context=224, kv_dtype=kv_dtype, max_batch=4)
    pool = engine.scheduler.block_pool
    hidden = pool.allocate(pool.num_blocks - num_blocks)  # few blocks: requests are evicted and preempted
    pool._holders.clear()
    pool.num_blocks = num_blocks
    assert hidden is not None
    engine.scheduler.max_num_batched_tokens, engine.scheduler.max_batch = budget, max_batch
    seen = logits_of(engine, requests)
    assert pool.num_free_blocks == num_blocks
    for each in requests:
        fresh = load_engine(checkpoint, context=224, kv_dtype=kv_dtype, max_batch=1)
        for key, row in logits_of(fresh, [each]).items():
            assert torch.equal(seen[key], row), key
