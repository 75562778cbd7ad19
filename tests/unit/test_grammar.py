from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from pathlib import Path

import pytest
import torch

import tiny
from engine_client import answer, request, running
from glmlocal import LLM
from glmlocal.engine import grammar as grammar_module
from glmlocal.engine.batch import ScheduledRequest
from glmlocal.engine.grammar import Constraint, GrammarCompiler, GrammarLimits
from glmlocal.engine.request import FinishReason, Grammar, Request, SamplingParams
from glmlocal.engine.sampler import Sampler
from glmlocal.errors import RequestError
from glmlocal.text.tokenizer import Tokenizer, load_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["fox", "dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


CHAIN = '{"$ref":"#/$defs/a0","$defs":{%s}}'  # of references; long ones overflowed the compiler's stack


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    directory = tiny.save(tiny.build_model(**tiny.CONFIGS["glm45"]), tmp_path_factory.mktemp("grammar"))
    return LLM(directory, context=256)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(directory)
    return load_tokenizer(directory)


@pytest.fixture
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, 384, [EOS, OTHER_EOS])


EOS, OTHER_EOS = 1, 2  # <|endoftext|>, <|user|>


def feed(constraint: Constraint, tokenizer: Tokenizer, text: str) -> bool:
    """Take the text's tokens, each of which must be allowed; True if nothing may follow."""
    ends = False
    for token in tokenizer.encode(text):
        allowed = constraint.allowed()
        assert allowed is not None
        assert allowed.shape == (384,)
        assert allowed[token], tokenizer.decode([token])
        ends = constraint.accept(token)
    return ends


@pytest.mark.parametrize(
    ("kind", "source", "text", "then"),
    [
        ("json_schema", json.dumps(SCHEMA), '{"name": "fox", "age": 12', "}"),
        ("json_object", "", '{"any": [1, {"thing": null}]', "}"),
        ("regex", "[a-c]{3}", "ab", "c"),
        ("lark", 'start: "quick" " " ("fox" | "dog")', "quick do", "g"),
        ("choice", '["yes", "no way"]', "no wa", "y"),
    ],
)
def test_what_fits_is_allowed_and_the_end_is_seen(
    compiler: GrammarCompiler, tokenizer: Tokenizer, kind: str, source: str, text: str, then: str
) -> None:
    constraint = compiler.compile(Grammar(kind, source))
    assert not feed(constraint, tokenizer, text)
    allowed = constraint.allowed()
    assert allowed is not None
    assert not allowed[EOS]
    assert not allowed[tokenizer.encode("@")[0]]
    assert feed(constraint, tokenizer, then)


def test_any_eos_is_allowed_where_the_text_may_end_and_only_there(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    constraint = compiler.compile(Grammar("regex", "a+"))
    assert not constraint.allowed()[[EOS, OTHER_EOS]].any()
    feed(constraint, tokenizer, "a")
    assert constraint.allowed()[[EOS, OTHER_EOS]].all()


def test_a_grammar_begins_after_its_token(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    end_think = tokenizer.token_to_id("</think>")
    constraint = compiler.compile(Grammar("regex", "a+", after_token_id=end_think))
    for token in tokenizer.encode("thinking of b and c"):
        assert constraint.allowed() is None
        assert not constraint.accept(token)
    constraint.accept(end_think)
    allowed = constraint.allowed()
    assert allowed is not None
    assert allowed[tokenizer.encode("a")[0]]
    assert not allowed[tokenizer.encode("b")[0]]


def test_text_never_spells_a_special_token(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    allowed = compiler.compile(Grammar("regex", "(?s:.*)")).allowed()
    assert not allowed[[tokenizer.token_to_id(name) for name in ("<think>", "</think>", "<|assistant|>")]].any()


def test_answers_of_one_grammar_do_not_share_their_place(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    first, second = (compiler.compile(Grammar("regex", "abc")) for _ in range(2))
    feed(first, tokenizer, "ab")
    feed(second, tokenizer, "a")
    assert feed(first, tokenizer, "c")


@pytest.mark.parametrize(
    ("kind", "source", "words"),
    [
        ("json_schema", "{", "json_schema is not JSON"),
        ("json_schema", "[1]", "json_schema is list, wanted an object"),
        ("json_schema", '{"type": "colour"}', "colour"),
        ("json_schema", '{"$ref": "http://example.com/x.json"}', "http://example.com"),
        ("json_schema", '{"not":' * 200 + "true" + "}" * 200, "nested deeper than 64"),
        ("regex", "(a", "regex cannot be used"),
        ("regex", "(" * 5000 + "a" + ")" * 5000, "nested deeper than 64"),
        ("regex", "a\0b", "NUL"),
        (
            "json_schema",
            CHAIN % ",".join(f'"a{i}":{{"$ref":"#/$defs/a{i + 1}"}}' for i in range(5000)),
            "5,001 references",
        ),
        ("lark", "start: T0\n" + "\n".join(f"T{i}: T{i + 1}" for i in range(5000)) + '\nT5000: "a"', "references"),
        ("lark", "start: nowhere", "lark cannot be used"),
        ("choice", "[]", "list of non-empty strings"),
        ("choice", '"a"', "list of non-empty strings"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name(
    compiler: GrammarCompiler, kind: str, source: str, words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        compiler.compile(Grammar(kind, source))


def test_the_longest_chains_that_are_accepted_compile(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    links = [f'"a{i}":{{"$ref":"#/$defs/a{i + 1}"}}' for i in range(998)] + ['"a998":{"const":1}']
    assert feed(compiler.compile(Grammar("json_schema", CHAIN % ",".join(links))), tokenizer, "1")
    rules = [f"T{i}: T{i + 1}" for i in range(998)] + ['T998: "a"']
    assert feed(compiler.compile(Grammar("lark", "start: T0\n" + "\n".join(rules))), tokenizer, "a")


def test_unknown_kinds_and_endless_sources_are_refused() -> None:
    with pytest.raises(RequestError, match="kind is 'xml'"):
        Grammar("xml", "")
    with pytest.raises(RequestError, match="262,144 characters"):
        Grammar("regex", "a" * 300_000)
    with pytest.raises(RequestError, match="wanted a Grammar"):
        SamplingParams(grammar={"kind": "regex"})  # type: ignore[arg-type]


def test_a_compiler_that_takes_too_long_is_not_waited_for(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(grammar_module, "_definition", lambda *args: go_on.wait(60) and "")
    compiler = GrammarCompiler(tokenizer, 384, [EOS], GrammarLimits(timeout_s=0.05))
    start_s = time.perf_counter()
    try:
        with pytest.raises(RequestError, match=r"longer than 0\.05 s"):
            compiler.compile(Grammar("regex", "a"))
        assert time.perf_counter() - start_s < 30
    finally:
        go_on.set()


def test_the_last_grammars_are_kept_and_no_more(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, built = GrammarCompiler(tokenizer, 384, [EOS], GrammarLimits(max_cached=2)), []
    build = compiler._build
    monkeypatch.setattr(compiler, "_build", lambda grammar: built.append(grammar.source) or build(grammar))
    for source in ("a", "b", "a", "c", "a", "b"):
        compiler.compile(Grammar("regex", source))
    assert built == ["a", "b", "c", "b"]


def sampled(constraint: Constraint, logits: torch.Tensor, **params: object) -> int:
    sampler = Sampler(384)
    sampler.constrain("r", constraint)
    wanted = Request("r", (0,), SamplingParams.from_dict(params), frozenset({EOS}))
    return sampler.sample(logits, ScheduledRequest(wanted, (0,), 0, (0,), (), True)).token_id


def test_the_mask_comes_before_the_choice_and_before_every_other_wish(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    logits = torch.zeros(384)
    logits[[a, b, c]] = torch.tensor([1.0, 2.0, 9.0])

    def constraint() -> Constraint:
        return compiler.compile(Grammar("regex", "[ab]"))

    assert sampled(constraint(), logits, temperature=0) == b
    assert sampled(constraint(), logits, temperature=0, logit_bias={b: -5, c: 100}) == a
    assert {sampled(constraint(), logits, temperature=3.0, seed=seed) for seed in range(20)} == {a, b}
    assert sampled(constraint(), logits, temperature=1.0, top_k=1, seed=1) == b
    ended = compiler.compile(Grammar("regex", "a?"))
    feed(ended, tokenizer, "a")
    assert sampled(ended, logits, temperature=0, min_tokens=9) in (EOS, OTHER_EOS)


def test_logprobs_are_of_the_logits_without_the_mask(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    logits = torch.randn(384, generator=torch.Generator().manual_seed(1))
    sampler = Sampler(384)
    sampler.constrain("r", compiler.compile(Grammar("regex", "a")))
    wanted = Request("r", (0,), SamplingParams(temperature=0, logprobs=1))
    token = sampler.sample(logits, ScheduledRequest(wanted, (0,), 0, (0,), (), True))
    (a,) = tokenizer.encode("a")
    assert (token.token_id, token.ends) == (a, True)
    assert token.logprob is not None
    assert math.isclose(token.logprob.logprob, float(logits.log_softmax(-1)[a]))
    assert token.logprob.top[0][0] == int(logits.argmax())


def test_a_model_of_noise_writes_what_the_schema_says(llm: LLM) -> None:
    options = {"temperature": 1.5, "max_tokens": 150, "grammar": Grammar("json_schema", json.dumps(SCHEMA))}
    answers = [llm.generate("fox", seed=seed, **options) for seed in range(4)]
    values = [json.loads(each.text) for each in answers]
    assert all(value["name"] in ("fox", "dog") and 0 <= value["age"] <= 99 for value in values)
    assert {each.finish_reason for each in answers} == {"stop"}
    with pytest.raises(RequestError, match="regex cannot be used"):
        llm.generate("fox", grammar=Grammar("regex", "("))


def test_grammars_hold_in_a_batch_and_leave_the_others_alone(llm: LLM) -> None:
    fox = llm.tokenizer.encode("fox")

    async def main() -> None:
        async with running(llm.engine) as client:
            free = await answer(client, request("free", fox))
            wanted = [request("also free", fox)] + [
                request(str(i), fox, grammar=Grammar("regex", f"[{i}x]{{{i},9}}")) for i in range(1, 5)
            ]
            answers = await asyncio.gather(*(answer(client, each) for each in wanted))
            assert answers[0].token_ids == free.token_ids
            for i, each in list(enumerate(answers))[1:]:
                text = llm.tokenizer.decode(each.token_ids, skip_special_tokens=True)
                assert set(text) <= {str(i), "x"}
                assert i <= len(text) <= 9
                assert each.last.finish_reason is FinishReason.STOP
            with pytest.raises(RequestError, match="regex cannot be used"):
                await answer(client, request("bad", fox, grammar=Grammar("regex", "(")))
            stream = client.submit(request("gone", fox, grammar=Grammar("regex", "b{5}")))
            client.abort("gone")
            assert [output.finish_reason async for output in stream] == [FinishReason.ABORT]

    asyncio.run(main())
    assert not llm.engine.has_work


def test_a_model_without_a_tokenizer_refuses_grammars(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.engine, "grammars", None)
    with pytest.raises(RequestError, match="no tokenizer"):
        llm.engine.check(request("a", [1], grammar=Grammar("json_object")))


def test_the_scratch_directory_is_not_needed(tmp_path: Path, compiler: GrammarCompiler) -> None:
    """Schemas are not looked up: not on the network, and not on the disk either."""
    (tmp_path / "x.json").write_text('{"type": "string"}')
    with pytest.raises(RequestError):
        compiler.compile(Grammar("json_schema", json.dumps({"$ref": (tmp_path / "x.json").as_uri()})))


def fits(constraint: Constraint, tokenizer: Tokenizer, text: str) -> bool:
    for token in tokenizer.encode(text):
        allowed = constraint.allowed()
        assert allowed is not None
        if not allowed[token]:
            return False
        constraint.accept(token)
    return True


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("json_schema", json.dumps(SCHEMA)),
        (
            "json_schema",
            json.dumps({**SCHEMA, "x-guidance": {"whitespace_pattern": "[ ]+"}}),
        ),  # not the client's to say
        ("json_object", ""),
    ],
)
def test_white_space_in_json_ends(compiler: GrammarCompiler, tokenizer: Tokenizer, kind: str, source: str) -> None:
    grammar = Grammar(kind, source)
    for text in ('{"name":"fox"', '{"name": "fox", "age": 1}', '{\n  "name": "fox",\n  "age": 1\n}'):
        assert fits(compiler.compile(grammar), tokenizer, text), text
    for text in ('{\n\n"', "{   ", '{"name": "fox"\n\n\n', "{ \n \n"):
        assert not fits(compiler.compile(grammar), tokenizer, text), text
