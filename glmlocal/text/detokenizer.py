"""Token ids → text, one id at a time, never half a character."""

from __future__ import annotations

import codecs

from glmlocal.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Decodes one answer as it is generated.

    All pushes and ``finish()`` joined equal ``tokenizer.decode(ids, skip_special_tokens)``. A byte-level token is a
    fixed run of bytes, so an incremental UTF-8 decoder is all it takes: it keeps at most the three bytes of an
    unfinished character, and a token costs the same however long the answer is.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that is now certain. Bytes that no continuation can make valid come out as U+FFFD."""
        return "" if token_id in self._skipped else self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What was held back; U+FFFD if the answer ends inside a character."""
        return self._utf8.decode(b"", final=True)
