"""What a checkpoint says about sampling, and which tokens end a turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from glmlocal.errors import CheckpointError
from glmlocal.text.files import quoted, read_json_object
from glmlocal.text.tokenizer import Tokenizer

_RANGES = {  # name: least, most; both allowed
    "temperature": (0.0, 100.0),
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 1e3),
}
_MAX_EOS_IDS = 1024
_GGUF_KEYS = {  # what llama.cpp's converter makes of the same file; names of llama.cpp's own options
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a checkpoint recommends, of the fields an engine can honour. None: its files say nothing.

    ``do_sample`` is left out on purpose: GLM's files give a temperature without it.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # 0: off
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()

    def sampling(self) -> dict[str, float | int]:
        """The sampling fields that are set, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "eos_token_ids"}
        return {name: value for name, value in named.items() if value is not None}


def load_generation_defaults(directory: Path) -> GenerationDefaults:
    """The directory's generation_config.json; empty if it has none. Raises CheckpointError naming the field."""
    path = directory / "generation_config.json"
    raw = read_json_object(path) or {}
    names = {name: name for name in _GGUF_KEYS}
    return _defaults(raw, names, str(path), eos_ids(raw.get("eos_token_id"), str(path)))


def generation_defaults_from_gguf(metadata: Mapping[str, object]) -> GenerationDefaults:
    """The keys ``general.sampling.*``; the turn's end is the tokenizer's there. Raises CheckpointError naming a key."""
    return _defaults(metadata, _GGUF_KEYS, "the GGUF metadata", ())


def _defaults(
    raw: Mapping[str, object], names: Mapping[str, str], where: str, eos_token_ids: tuple[int, ...]
) -> GenerationDefaults:
    """``names``: what each field is called in ``raw``."""
    numbers = {field: _number(raw, names[field], low, high, where) for field, (low, high) in _RANGES.items()}
    return GenerationDefaults(**numbers, top_k=_top_k(raw, names["top_k"], where), eos_token_ids=eos_token_ids)


def stop_token_ids(
    defaults: GenerationDefaults, config: Mapping[str, object], tokenizer: Tokenizer | None, vocab_size: int
) -> tuple[int, ...]:
    """Ids that end a turn, each once: of generation_config.json, of config.json, of the tokenizer (for a GGUF file its
    eos, eot and eom). For GLM these are ``<|endoftext|>``, ``<|user|>`` and ``<|observation|>``.

    Ids beyond the model's vocabulary of ``vocab_size`` rows are left out: cut-down models keep those of their parent.
    Raises CheckpointError for what is no id at all.
    """
    ids = [*defaults.eos_token_ids, *eos_ids(config.get("eos_token_id"), "config.json")]
    ids += tokenizer.eos_ids if tokenizer else ()
    return tuple(id_ for id_ in dict.fromkeys(ids) if id_ < vocab_size)


def eos_ids(value: object, where: str) -> tuple[int, ...]:
    """``eos_token_id`` is an int, a list of them, or null. Raises CheckpointError."""
    values = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if len(values) > _MAX_EOS_IDS or not all(type(id_) is int and id_ >= 0 for id_ in values):
        raise CheckpointError(f"{where}: eos_token_id is {quoted(value)}; it must be a token id or a list of them")
    return tuple(dict.fromkeys(values))


def _number(raw: Mapping[str, object], name: str, low: float, high: float, where: str) -> float | None:
    value = raw.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:  # NaN is in no range
        raise CheckpointError(f"{where}: {name} is {quoted(value)}; it must be a number of {low:g} … {high:g}")
    return float(f"{value:.7g}")  # GGUF stores 32-bit floats: 0.95 arrives as 0.949999988


def _top_k(raw: Mapping[str, object], name: str, where: str) -> int | None:
    value = raw.get(name)
    if value is None:
        return None
    if type(value) is not int or not -1 <= value < 2**31:
        raise CheckpointError(f"{where}: {name} is {quoted(value)}; it must be a count, 0 or -1 for off")
    return max(value, 0)
