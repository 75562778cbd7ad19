from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from glmlocal.engine.batch import ScheduledRequest
from glmlocal.engine.request import Request, SamplingParams, TokenLogprob
from glmlocal.engine.sampler import Sampler, apply_penalties, likely_probs, logprob_of, truncated_probs
from glmlocal.errors import RequestError

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0, -2.0])


def item(params: SamplingParams, *, prompt: tuple[int, ...] = (0,), output: tuple[int, ...] = ()) -> ScheduledRequest:
    return ScheduledRequest(Request("r", prompt, params, frozenset({4})), (0,), 0, (0,), output, True)


def penalised(prompt: tuple[int, ...] = (0,), output: tuple[int, ...] = (), **params: object) -> torch.Tensor:
    scheduled = item(SamplingParams.from_dict(params), prompt=prompt, output=output)
    return apply_penalties(LOGITS, scheduled.request, output)


def kept(**params: object) -> set[int]:
    return set(truncated_probs(LOGITS, SamplingParams.from_dict(params)).nonzero().flatten().tolist())


def test_greedy_takes_the_largest_and_the_lowest_id_among_equals() -> None:
    sampler = Sampler(6)
    assert sampler.sample(LOGITS, item(SamplingParams(temperature=0))).token_id == 4
    tied = torch.tensor([0.0, 5.0, 5.0, 1.0, 5.0, 0.0])
    assert sampler.sample(tied, item(SamplingParams(temperature=0))).token_id == 1


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_output() -> None:
    out = penalised(prompt=(0, 0), output=(5,), repetition_penalty=2.0)
    assert out.tolist() == [1.0, 1.0, 0.0, -1.0, 3.0, -4.0]


def test_presence_and_frequency_penalties_count_the_output_alone() -> None:
    out = penalised(prompt=(0,), output=(1, 1, 4), presence_penalty=0.5, frequency_penalty=0.25)
    assert out.tolist() == [2.0, 1.0 - 0.5 - 0.5, 0.0, -1.0, 3.0 - 0.5 - 0.25, -2.0]


def test_logit_bias_is_added_and_ids_beyond_the_vocabulary_are_ignored() -> None:
    assert penalised(logit_bias={3: 10.0, 99: 1.0}).tolist() == [2.0, 1.0, 0.0, 9.0, 3.0, -2.0]


def test_min_tokens_forbids_eos_and_stop_tokens_until_reached() -> None:
    assert penalised(min_tokens=2, stop_token_ids=[0]).tolist() == [-math.inf, 1.0, 0.0, -1.0, -math.inf, -2.0]
    assert penalised(output=(1,), min_tokens=2, stop_token_ids=[0]) is LOGITS


def test_truncation_keeps_exactly_what_each_rule_says() -> None:
    probs = LOGITS.softmax(-1)  # in order: ids 4, 0, 1, 2, 3, 5
    assert kept(top_k=2) == {4, 0}
    assert kept(top_k=-1) == kept(top_k=0) == kept(top_k=6) == set(range(6))
    assert kept(top_p=float(probs[4]) - 1e-4) == {4}
    assert kept(top_p=float(probs[4]) + 1e-4) == {4, 0}
    assert kept(min_p=float(probs[1] / probs[4]) - 1e-4) == {4, 0, 1}
    assert kept(min_p=float(probs[1] / probs[4]) + 1e-4) == {4, 0}
    # top-p is taken of what top-k left: 4 alone has 0.73 of {4, 0}
    assert kept(top_k=2, top_p=0.7) == {4}
    # min-p looks at the tempered distribution: a high temperature flattens it
    assert kept(temperature=10.0, min_p=0.5) == set(range(6))
    assert kept(temperature=0.1, min_p=0.5) == {4}


def test_samples_follow_the_distribution() -> None:
    params = SamplingParams(temperature=0.7, top_k=3)
    probs = truncated_probs(LOGITS, params)
    sampler, scheduled = Sampler(6), item(SamplingParams(temperature=0.7, top_k=3, seed=1))
    counts = Counter(sampler.sample(LOGITS, scheduled).token_id for _ in range(4000))
    expected = probs / probs.sum() * 4000
    chi_square = sum((counts[i] - float(expected[i])) ** 2 / float(expected[i]) for i in (4, 0, 1))
    assert set(counts) == {4, 0, 1}
    assert chi_square < 13.8  # 99.9th percentile, two degrees of freedom; the seed is fixed


def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch() -> None:
    def draw(rows: int) -> list[int]:
        sampler, seeded = Sampler(6), item(SamplingParams(seed=7))
        others = [
            ScheduledRequest(Request(str(i), (0,), SamplingParams()), (0,), 0, (0,), (), True) for i in range(rows)
        ]
        return [[sampler.sample(LOGITS, each) for each in (*others, seeded)][-1].token_id for _ in range(20)]

    assert draw(0) == draw(3)
    assert len(set(draw(0))) > 1


def test_another_seed_gives_other_tokens() -> None:
    def draw(seed: int) -> tuple[int, ...]:
        sampler = Sampler(6)
        return tuple(sampler.sample(LOGITS, item(SamplingParams(seed=seed))).token_id for _ in range(20))

    assert len({draw(seed) for seed in (0, 1, 2, 7)}) == 4


def test_top_p_that_is_reached_exactly_needs_no_more() -> None:
    tied = torch.tensor([0.0, 0.0, float("-inf")])  # a half each
    assert truncated_probs(tied, SamplingParams(top_p=0.5)).count_nonzero() == 1


def test_logprobs_are_of_the_unmodified_logits() -> None:
    expected = LOGITS.log_softmax(-1)
    got = logprob_of(LOGITS, 1, 2)
    assert got == TokenLogprob(1, float(expected[1]), ((4, float(expected[4])), (0, float(expected[0]))))
    sampler = Sampler(6)
    params = SamplingParams(temperature=0, logprobs=0, logit_bias={1: 100.0})
    token = sampler.sample(LOGITS, item(params))
    assert (token.token_id, token.logprob) == (1, TokenLogprob(1, float(expected[1]), ()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("max_tokens", -1),
        ("seed", 2**64),
        ("logprobs", 1000),
        ("presence_penalty", 3),
        ("repetition_penalty", 0),
        ("stop", [""]),
        ("stop", ["x"] * 100),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {1: math.inf}),
        ("stop_token_ids", [1.0]),
        ("colour", 1),
    ],
)
def test_bad_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name):
        SamplingParams.from_dict({name: value})


def test_a_single_stop_string_need_not_be_wrapped_in_a_list() -> None:
    assert SamplingParams(stop="END").stop == ("END",)


SHAPES = {
    "peaked": lambda noise: noise * 3 + 12.0 * (torch.arange(len(noise)) % 997 == 5),
    "usual": lambda noise: noise * 4,
    "flat": lambda noise: noise * 1e-3,
    "equal": lambda noise: torch.zeros_like(noise),
    "few": lambda noise: noise.where(torch.arange(len(noise)) % 4001 == 1, -math.inf),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "params",
    [
        {"top_p": 0.95},
        {"top_p": 0.5, "temperature": 0.3},
        {"top_p": 0.9999},
        {"top_k": 40},
        {"top_k": 1},
        {"top_k": 40, "top_p": 0.95},
        {"top_k": 5000, "top_p": 0.8, "temperature": 2.0},
        {"min_p": 0.02, "top_p": 0.95},
        {"min_p": 0.5, "top_k": 50, "top_p": 0.1},
        {"top_k": 30_000, "top_p": 0.95},
    ],
)
def test_tokens_that_are_likely_are_found_without_sorting_all(shape: str, params: dict[str, float]) -> None:
    given = SamplingParams.from_dict(params)
    logits = SHAPES[shape](torch.randn(20_011, generator=torch.Generator().manual_seed(5)))
    plain = truncated_probs(logits, given)
    found = likely_probs(logits, given)
    if shape in ("peaked", "usual") and params.get("top_p") != 0.9999 and params.get("top_k") != 5000:
        assert found is not None, "the fast way is taken where models are"
    if found is not None:
        token_ids, probs = found
        assert token_ids.tolist() == plain.nonzero().flatten().tolist()
        assert probs.tolist() == plain[token_ids].tolist()


def test_a_draw_among_few_is_the_draw_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(5_000, generator=torch.Generator().manual_seed(1)) * 3

    def draws() -> list[int]:
        sampler, scheduled = Sampler(5_000), item(SamplingParams(top_p=0.9, seed=3))
        return [sampler.sample(logits, scheduled).token_id for _ in range(200)]

    fast = draws()
    monkeypatch.setattr("glmlocal.engine.sampler.likely_probs", lambda *_: None)
    assert draws() == fast
    assert len(set(fast)) > 20


def test_plain_greedy_requests_are_chosen_together_as_alone() -> None:
    logits = torch.randn(3, 700, generator=torch.Generator().manual_seed(2))
    logits[1, 600] = logits[1, 50] = 9.0
    sampler = Sampler(700)
    plain = [item(SamplingParams(temperature=0)) for _ in range(3)]
    together = sampler.greedy(logits, plain)
    assert together == [sampler.sample(row, each) for row, each in zip(logits, plain, strict=True)]
    assert together is not None
    assert together[1].token_id == 50
    assert sampler.greedy(logits[:0], []) is None


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.5},
        {"logprobs": 0},
        {"logit_bias": {3: 1.0}},
        {"min_tokens": 2},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
    ],
)
def test_whoever_wants_more_than_the_largest_logit_is_served_alone(params: dict[str, object]) -> None:
    wanted = item(SamplingParams.from_dict({"temperature": 0, **params}))
    plain = item(SamplingParams(temperature=0))
    assert Sampler(6).greedy(LOGITS.expand(2, 6), [plain, wanted]) is None


def test_whoever_keeps_to_a_grammar_is_served_alone() -> None:
    sampler = Sampler(6)
    sampler.constrain("r", object())  # type: ignore[arg-type]
    assert sampler.greedy(LOGITS[None], [item(SamplingParams(temperature=0))]) is None
    sampler.forget("r")
    assert sampler.greedy(LOGITS[None], [item(SamplingParams(temperature=0))]) is not None
