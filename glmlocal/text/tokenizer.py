"""Byte-level BPE: text ↔ token ids, from a tokenizer.json or from the metadata of a GGUF file.

Owns the vocabulary, the special tokens and their names. Does not know chat templates, nor how to decode a stream
(``detokenizer``). The merging itself is done by the ``tokenizers`` library.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models

from glmlocal.errors import CheckpointError, RequestError
from glmlocal.text.files import one_line, parse_json_object, quoted, read_json_object, read_text_file
from glmlocal.text.pre_tokenizers import PRE_TOKENIZERS, nfc
from glmlocal.units import MIB

TOKENIZER_JSON_MAX_BYTES = 256 * MIB  # GLM-4.5's is 20 MB
_BEGINNING_CHARS = 16  # per token: text has 2 to 5, so that its beginning makes several times the tokens asked about


class Tokenizer:
    """Token ids of a byte-level BPE vocabulary. Immutable and safe to share between threads.

    ``vocab_size``     one more than the highest id in use; a model's embedding may have more rows (padding)
    ``special_ids``    ids left out by ``decode(..., skip_special_tokens=True)``; ``</think>`` is *not* one of them
    ``added_ids``      ids of tokens that stand beside the vocabulary: special ones, ``</think>``, ``<tool_call>`` …
    ``eos_ids``        ids that end a turn according to the tokenizer's own files
    ``special_tokens`` names such as ``bos_token`` → their text, for chat templates
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        vocab_size: int,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        special_tokens: Mapping[str, str] | None = None,
        prefix_ids: Sequence[int] = (),
        suffix_ids: Sequence[int] = (),
    ) -> None:
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._prefix_ids = list(prefix_ids)
        self._suffix_ids = list(suffix_ids)
        self._bytes: dict[int, bytes] = {id_: token.content.encode() for id_, token in added.items()}
        self.vocab_size = vocab_size
        self.added_ids = frozenset(added)
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.special_tokens = dict(special_tokens or {})

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of ``text``; the text of an added token becomes that token. Chat templates write their own special
        tokens, so none are added unless asked for. Raises RequestError."""
        try:  # ``encode`` keeps every other thread waiting, and takes twice as long for offsets that nobody wants
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError:  # what the library says of a string that has no UTF-8 form
            raise RequestError("the text holds half a surrogate pair and is not valid Unicode") from None
        ids: list[int] = encoding.ids
        return [*self._prefix_ids, *ids, *self._suffix_ids] if add_special_tokens else ids

    def surely_exceeds(self, text: str, num_tokens: int) -> bool:
        """Does the text make more tokens than that, to judge by its beginning? False where only the whole would tell.

        A text that is many times too long is known without tokenizing all of it: seconds and hundreds of MB.
        """
        beginning = num_tokens * _BEGINNING_CHARS
        return len(text) > 2 * beginning and len(self.encode(text[:beginning])) > 2 * num_tokens

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of ``ids``. Bytes that are not UTF-8 become U+FFFD; ids without a token give nothing."""
        skip = self.special_ids if skip_special_tokens else frozenset()
        return b"".join(self.token_bytes(id_) for id_ in ids if id_ not in skip).decode("utf-8", "replace")

    def token_to_id(self, token: str) -> int | None:
        """The id of a token in its stored form (``Ġhello``, ``<|user|>``), or None."""
        id_: int | None = self._backend.token_to_id(token)
        return id_

    def id_to_token(self, id_: int) -> str | None:
        """The stored form of an id, or None for a padding row."""
        token: str | None = self._backend.id_to_token(id_) if 0 <= id_ < self.vocab_size else None
        return token

    def token_bytes(self, id_: int) -> bytes:
        """The bytes that a token stands for (a token may be half a character); nothing for an id without a token."""
        known = self._bytes.get(id_)
        if known is None:
            known = _to_bytes(self.id_to_token(id_) or "")
            self._bytes[id_] = known
        return known


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins: bytes that print stand for themselves, the others for U+0100, U+0101, …"""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def _to_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:  # not in byte-level form: stands for itself, as in the tokenizers library
        return token.encode()


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a model directory: tokenizer.json, and tokenizer_config.json if there is one.

    Raises CheckpointError: missing or damaged file, a kind other than byte-level BPE, ids that contradict each other.
    """
    path = directory / "tokenizer.json"
    text = read_text_file(path, max_bytes=TOKENIZER_JSON_MAX_BYTES)
    if text is None:
        raise CheckpointError(f"{path} is missing; a model directory needs the tokenizer.json it was released with")
    spec = parse_json_object(text, str(path))
    _check_bpe_spec(spec, str(path))
    backend = _parse_backend(text, str(path))
    backend.no_truncation()  # some files carry a training-time length limit
    backend.no_padding()
    if not isinstance(backend.decoder, decoders.ByteLevel):
        raise CheckpointError(f"{path} has decoder {_kind(spec.get('decoder'))}; only ByteLevel is supported")

    config_path = directory / "tokenizer_config.json"
    config = read_json_object(config_path) or {}
    _add_missing_tokens(backend, config.get("added_tokens_decoder"), str(config_path))
    _check_added_ids(backend, spec.get("added_tokens"), str(path))
    named = _named_tokens(config, str(config_path))
    eos = named.get("eos_token")
    eos_id = None if eos is None else backend.token_to_id(eos)
    if eos is not None and eos_id is None:
        raise CheckpointError(f"{config_path} names eos_token {eos!r}, which {path.name} does not hold")
    vocab: dict[str, int] = spec["model"]["vocab"]  # type: ignore[index]
    return Tokenizer(
        backend,
        vocab_size=max([*vocab.values(), *backend.get_added_tokens_decoder()], default=-1) + 1,
        bos_id=backend.token_to_id(named["bos_token"]) if "bos_token" in named else None,
        eos_ids=() if eos_id is None else (eos_id,),
        special_tokens=named,
    )


def _kind(part: object) -> str:
    return quoted(part.get("type") if isinstance(part, Mapping) else part)


def _check_bpe_spec(spec: Mapping[str, object], where: str) -> None:
    """The library aborts with a Rust backtrace on merges and ids that contradict the vocabulary; look first."""
    model = spec.get("model")
    if not isinstance(model, Mapping) or model.get("type", "BPE") != "BPE":
        raise CheckpointError(f"{where} holds a {_kind(model)} model; only byte-level BPE is supported")
    for field in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise CheckpointError(f"{where} sets {field}, which byte-level BPE does not have")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise CheckpointError(f"{where} has no model.vocab and model.merges; fetch the file again")
    ids = set(vocab.values()) if all(type(id_) is int for id_ in vocab.values()) else set()
    if len(ids) != len(vocab) or min(ids, default=0) < 0 or max(ids, default=0) >= 2**31:
        raise CheckpointError(f"{where} gives two tokens one id, or an id outside 0…2^31; fetch the file again")
    unknown = model.get("unk_token")
    if unknown is not None and (not isinstance(unknown, str) or unknown not in vocab):
        raise CheckpointError(f"{where}: unk_token {quoted(unknown)} is not in the vocabulary; fetch the file again")
    _split_merges(merges, vocab, where)


def _split_merges(merges: Sequence[object], vocab: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    """``"a b"`` or ``["a", "b"]`` → ``("a", "b")``; both parts and their sum must be tokens."""
    pairs: list[tuple[str, str]] = []  # 318,088 of them for GLM-4.5, so the loop does nothing twice
    try:
        for merge in merges:
            parts: Any = merge.split(" ") if isinstance(merge, str) else merge
            left, right = parts
            if left not in vocab or right not in vocab or left + right not in vocab:
                break
            pairs.append((left, right))
        else:
            return pairs
    except (TypeError, ValueError):
        pass
    raise CheckpointError(
        f"{where}: merge {len(pairs)} is {quoted(merges[len(pairs)])}, which is not two tokens that make a third; "
        "fetch the file again"
    )


def _parse_backend(text: str, where: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the Rust library is not an Exception
        raise CheckpointError(f"{where} cannot be used: {one_line(error)}; fetch the file again") from error


def _add_missing_tokens(backend: tokenizers.Tokenizer, decoder: object, where: str) -> None:
    """``added_tokens_decoder`` of tokenizer_config.json: normally a copy of what tokenizer.json says."""
    if decoder is None:
        return
    if not isinstance(decoder, Mapping):
        raise CheckpointError(f"{where}: added_tokens_decoder is not an object; fetch the file again")
    missing = []
    for key, entry in decoder.items():
        content = entry.get("content") if isinstance(entry, Mapping) else None
        if not key.isdecimal() or len(key) > 9 or not isinstance(content, str) or not content:
            raise CheckpointError(f"{where}: added_tokens_decoder entry {quoted(key)} is not an id with a content")
        if backend.token_to_id(content) is None:
            flags = {f: bool(entry.get(f)) for f in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            missing.append((int(key), AddedToken(content, **flags)))
    for id_, token in sorted(missing, key=lambda pair: pair[0]):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != id_:
            raise CheckpointError(f"{where}: added token {quoted(token.content)} cannot have id {id_}; ids have a gap")


def _check_added_ids(backend: tokenizers.Tokenizer, added: object, where: str) -> None:
    """The library renumbers an added token whose id does not follow the vocabulary; the model would not know it."""
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, Mapping) and backend.token_to_id(entry.get("content", "")) != entry.get("id"):
            raise CheckpointError(
                f"{where}: added token {quoted(entry.get('content'))} wants id {quoted(entry.get('id'))}, which does "
                "not follow the vocabulary; fetch the file again"
            )


def _named_tokens(config: Mapping[str, object], where: str) -> dict[str, str]:
    named = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if text is None:
            continue
        if not isinstance(text, str):
            raise CheckpointError(f"{where}: {name} is {quoted(value)}, not a token's text")
        named[name] = text
    return named


_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # token types; 0 undefined and 5 unused are no text
_TEXTUAL = frozenset({_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE})


def tokenizer_from_gguf(metadata: Mapping[str, object]) -> Tokenizer:
    """The tokenizer of a GGUF file, from its ``tokenizer.ggml.*`` keys.

    Control tokens are special; user-defined ones (``</think>``, ``<tool_call>``) are single tokens but not special.
    Raises CheckpointError: unsupported model or pre-tokenizer, lists that disagree, absent tokens, ids out of range.
    """
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2":
        raise CheckpointError(
            f"the GGUF file has tokenizer model {quoted(model)}; only 'gpt2' (byte-level BPE) is supported"
        )
    rule = PRE_TOKENIZERS.get(pre) if isinstance(pre, str) else None
    if rule is None:
        supported = ", ".join(PRE_TOKENIZERS)
        raise CheckpointError(f"the GGUF file has pre-tokenizer {quoted(pre)}; supported are {supported}")
    tokens = _string_list(metadata, "tokenizer.ggml.tokens")
    types = _token_types(metadata, len(tokens))
    vocab = {token: id_ for id_, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind in _TEXTUAL}
    if len(vocab) != sum(kind in _TEXTUAL for kind in types) or "" in vocab:
        raise CheckpointError("the GGUF file lists a token twice or an empty token in tokenizer.ggml.tokens")
    merges = _split_merges(_string_list(metadata, "tokenizer.ggml.merges"), vocab, "tokenizer.ggml.merges")

    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule.ignore_merges))
    backend.pre_tokenizer = rule.build()
    backend.decoder = decoders.ByteLevel()
    if rule.nfc:
        backend.normalizer = nfc()
    # They are in the vocabulary already and keep their ids; this makes the text match as a whole.
    backend.add_tokens(
        [
            AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    named = {name: _token_id(metadata, name, vocab, tokens) for name in ("bos", "eos", "eot", "eom", "pad", "unk")}
    add_bos, add_eos = _flag(metadata, "add_bos_token", rule.adds_bos), _flag(metadata, "add_eos_token", False)
    bos, eos = named["bos"], named["eos"]
    return Tokenizer(
        backend,
        vocab_size=max(vocab.values(), default=-1) + 1,
        bos_id=bos,
        eos_ids=[id_ for id_ in (eos, named["eot"], named["eom"]) if id_ is not None],
        special_tokens={
            f"{name}_token": tokens[id_]
            for name, id_ in named.items()
            if id_ is not None and name in ("bos", "eos", "pad", "unk")
        },
        prefix_ids=[bos] if add_bos and bos is not None else [],
        suffix_ids=[eos] if add_eos and eos is not None else [],
    )


def _string_list(metadata: Mapping[str, object], key: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list | tuple):
        raise CheckpointError(f"the GGUF file has no list {key}; it was converted without its tokenizer")
    for index, value in enumerate(values):
        # A surrogate is what some readers leave in place of bytes that are not UTF-8.
        if not isinstance(value, str) or (not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value)):
            raise CheckpointError(f"{key}[{index}] is {quoted(value)}, not UTF-8 text; fetch the file again")
    return list(values)


def _token_types(metadata: Mapping[str, object], num_tokens: int) -> list[int]:
    key = "tokenizer.ggml.token_type"
    values = metadata.get(key)
    if values is None:
        return [_NORMAL] * num_tokens
    try:
        types = [operator.index(value) for value in values]  # type: ignore[attr-defined]
    except TypeError:
        raise CheckpointError(f"{key} is not a list of numbers; fetch the file again") from None
    if len(types) != num_tokens:
        raise CheckpointError(f"{key} has {len(types)} entries for {num_tokens} tokens; fetch the file again")
    if not set(types) <= set(range(7)):
        raise CheckpointError(f"{key} holds the unknown kind {quoted(max(types, key=abs))}; known are 0 to 6")
    return types


def _token_id(metadata: Mapping[str, object], name: str, vocab: Mapping[str, int], tokens: Sequence[str]) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return None
    id_ = value if isinstance(value, int) and not isinstance(value, bool) else -1
    if not 0 <= id_ < len(tokens) or tokens[id_] not in vocab:
        raise CheckpointError(f"{key} is {quoted(value)}, which is not one of the {len(tokens)} tokens")
    return id_


def _flag(metadata: Mapping[str, object], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"tokenizer.ggml.{name} is {quoted(value)}, not true or false")
    return default if value is None else value
