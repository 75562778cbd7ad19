from __future__ import annotations

import time

import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from glmlocal.text.detokenizer import IncrementalDetokenizer
from glmlocal.text.tokenizer import tokenizer_from_gguf
from tiny_text import SPECIAL, gguf_metadata, tokenizer_json

TOKENIZER = tokenizer_from_gguf(gguf_metadata())
REFERENCE = tokenizers.Tokenizer.from_str(tokenizer_json("glm4"))
# Single bytes make broken UTF-8 likely; the rest are words, tags and rows without a token.
ANY_ID = st.one_of(st.integers(0, 255), st.integers(0, TOKENIZER.vocab_size + 2))


def pieces(ids: list[int], skip_special_tokens: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(TOKENIZER, skip_special_tokens)
    return [*(detokenizer.push(id_) for id_ in ids), detokenizer.finish()]


@given(st.lists(ANY_ID, max_size=40), st.booleans())
def test_pieces_join_to_the_decoded_text(ids: list[int], skip: bool) -> None:
    assert "".join(pieces(ids, skip)) == TOKENIZER.decode(ids, skip_special_tokens=skip)


@given(st.lists(ANY_ID, max_size=40), st.booleans())
def test_decoding_is_that_of_the_library(ids: list[int], skip: bool) -> None:
    assert TOKENIZER.decode(ids, skip_special_tokens=skip) == REFERENCE.decode(ids, skip_special_tokens=skip)


@given(st.text(max_size=30))
def test_characters_come_whole_and_at_once(text: str) -> None:
    ids = [id_ for byte in text.encode() for id_ in range(256) if TOKENIZER.token_bytes(id_) == bytes([byte])]
    expected = []
    for char in text:
        expected += [""] * (len(char.encode()) - 1) + [char]
    assert pieces(ids, True) == [*expected, ""]


def test_invalid_bytes_come_out_as_replacement_characters() -> None:
    byte = {TOKENIZER.token_bytes(id_): id_ for id_ in range(256)}
    euro = [byte[b"\xe2"], byte[b"\x82"], byte[b"\xac"]]
    assert pieces(euro, True) == ["", "", "€", ""]
    assert pieces(euro[:2], True) == ["", "", "�"]  # cut off: only the end shows that it is no character
    assert pieces([euro[0], byte[b"a"]], True) == ["", "�a", ""]
    assert pieces([byte[b"\xff"]], True) == ["�", ""]


def test_special_tokens_are_skipped_inside_a_character() -> None:
    byte = {TOKENIZER.token_bytes(id_): id_ for id_ in range(256)}
    special = TOKENIZER.token_to_id(SPECIAL[0])
    assert special is not None
    ids = [byte[b"\xc3"], special, byte[b"\xa9"]]
    assert "".join(pieces(ids, True)) == "é"
    assert "".join(pieces(ids, False)) == f"�{SPECIAL[0]}�"


def test_a_token_costs_the_same_in_a_long_answer() -> None:
    ids = TOKENIZER.encode("The quick brown 狐狸 jumps 🚀. ") * 2000
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    start_s = time.process_time()
    for id_ in ids:
        detokenizer.push(id_)
    per_token_s = (time.process_time() - start_s) / len(ids)
    assert len(ids) > 10_000
    assert per_token_s < 50e-6  # about 1 µs; decoding the whole answer again for each token takes milliseconds
