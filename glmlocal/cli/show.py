"""``glmlocal show MODEL``: what a checkpoint is, from its headers alone.

``--json`` prints one object:

    name, path, format ("safetensors", "gguf"), architecture, model_type
    problem                      null, or why glmlocal cannot run it
    parameters                   {total, without_mtp, active, active_without_embeddings}; active is per token
    layers                       {total, dense, moe}
    experts                      {routed, per_token, shared, groups, groups_used}
    hidden_size, intermediate_size, moe_intermediate_size, vocab_size
    attention                    {heads, kv_heads, head_dim, rotary_dim, bias, qk_norm}
    context                      tokens
    kv_bytes_per_token           {used, "16bit", dtype}; used is what the cache takes in that dtype, the one of
                                 --kv-dtype auto
    mtp                          {layers, present, usable, problem, embedding_copy, head_copy}; layers as declared
    tie_word_embeddings, eos_token_ids, chat_template (true, false)
    tensors                      [{kind, dtypes {name: bytes}, tensors, parameters, bytes, bits_per_weight}]
    bytes                        {tensors, files}
    files                        [{name, bytes}]

The exit code is 0 for whatever could be read, also when ``problem`` is not null.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmlocal.cli.terminal import one_line
from glmlocal.errors import CheckpointError
from glmlocal.units import format_bytes, format_count

if TYPE_CHECKING:
    from glmlocal.formats.index import Checkpoint
    from glmlocal.models.config import ModelConfig

_KINDS = (
    "embeddings",
    "attention",
    "dense FFN",
    "shared experts",
    "routed experts",
    "router",
    "norms",
    "MTP",
    "head",
    "other",
)
_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.(.+)")
_HUB_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/[0-9a-f]+$")


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "show",
        help="say what a model is",
        description="Say what a model is: parameters, layers, experts, quantization, context, bytes. "
        "Only the files' headers are read, over the network if the model was not pulled.",
    )
    parser.add_argument("model", metavar="MODEL", help="a directory, a .gguf file, a name of a hub, or demo")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the description of ``args.model``. Raises CheckpointError for what is no checkpoint at all."""
    from glmlocal.opened import opened

    with opened(args.model) as found:
        facts = describe(found.checkpoint) | {"path": found.where}
    if args.json:
        print(json.dumps(facts, indent=2))  # ASCII: control characters of names come out as \u escapes
    else:
        _print(facts)
    return 0


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that ``show`` knows, in the form of ``--json``."""
    from glmlocal.models.config import (
        ModelConfig,
        check_tensors,
        expected_mtp_tensors,
        mtp_problem,
        optional_mtp_tensors,
    )
    from glmlocal.models.precision import auto_kv_dtype

    config = ModelConfig.from_hf(checkpoint.config)
    tensors = checkpoint.tensors
    problem: str | None = None
    try:
        check_tensors(config, tensors)
    except CheckpointError as error:
        problem = str(error)
    no_mtp = mtp_problem(config, tensors)
    copies = [name for name in optional_mtp_tensors(config) if name in tensors]
    kinds = _tensor_kinds(config, checkpoint)
    keys = tensors.get("model.layers.0.self_attn.k_proj.weight")
    kv_dtype = auto_kv_dtype(tensors.nbytes, keys.dtype if keys else "")
    files = [{"name": file.name, "bytes": file.stat().st_size} for file in tensors.files]
    return {
        "name": _name(checkpoint),
        "path": str(checkpoint.path),
        "format": tensors.kind,
        "architecture": "Glm4MoeForCausalLM",
        "model_type": "glm4_moe",
        "problem": problem,
        "parameters": _parameters(config, kinds),
        "layers": {
            "total": config.num_hidden_layers,
            "dense": config.first_k_dense_replace,
            "moe": config.num_hidden_layers - config.first_k_dense_replace,
        },
        "experts": {
            "routed": config.n_routed_experts,
            "per_token": config.num_experts_per_tok,
            "shared": config.n_shared_experts,
            "groups": config.n_group,
            "groups_used": config.topk_group,
        },
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.moe_intermediate_size,
        "vocab_size": config.vocab_size,
        "attention": {
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "rotary_dim": config.rotary_dim,
            "bias": config.attention_bias,
            "qk_norm": config.use_qk_norm,
        },
        "context": config.max_position_embeddings,
        "kv_bytes_per_token": {
            "used": config.kv_bytes_per_token(kv_dtype),
            "16bit": config.kv_bytes_per_token("bf16"),
            "dtype": kv_dtype,
        },
        "mtp": {
            "layers": config.num_nextn_predict_layers,
            "present": any(name in tensors for name in expected_mtp_tensors(config)),
            "usable": no_mtp is None,
            "problem": no_mtp,
            "embedding_copy": any(name.endswith(".embed_tokens.weight") for name in copies),
            "head_copy": any(name.endswith(".shared_head.head.weight") for name in copies),
        },
        "tie_word_embeddings": config.tie_word_embeddings,
        "eos_token_ids": list(config.eos_token_id),
        "chat_template": _has_chat_template(checkpoint),
        "tensors": kinds,
        "bytes": {"tensors": tensors.nbytes, "files": sum(file["bytes"] for file in files)},
        "files": files,
    }


def kind_of(name: str, num_hidden_layers: int) -> str:
    """Which row of the table a tensor belongs to."""
    layer = _LAYER.fullmatch(name)
    if layer is None:
        top = {"model.embed_tokens.": "embeddings", "lm_head.": "head", "model.norm.": "norms"}
        return next((kind for prefix, kind in top.items() if name.startswith(prefix)), "other")
    part = layer[2]
    if int(layer[1]) >= num_hidden_layers:
        return "MTP"
    if part.startswith("self_attn."):
        return "norms" if "_norm." in part else "attention"
    if part.startswith(("input_layernorm.", "post_attention_layernorm.")):
        return "norms"
    mlp = {"experts.": "routed experts", "shared_experts.": "shared experts", "gate.": "router"}
    if part.startswith("mlp."):
        return next((kind for prefix, kind in mlp.items() if part[4:].startswith(prefix)), "dense FFN")
    return "other"


def _tensor_kinds(config: ModelConfig, checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """A row per kind of tensor. Parameters are the model's (a packed format's arrays have others), bytes the files'."""
    from glmlocal.models.config import expected_mtp_tensors, expected_tensors, optional_mtp_tensors

    tensors, layers = checkpoint.tensors, config.num_hidden_layers
    rows: dict[str, dict[str, Any]] = {
        kind: {"kind": kind, "dtypes": {}, "tensors": 0, "parameters": 0, "bytes": 0, "bits_per_weight": None}
        for kind in _KINDS
    }
    mtp = expected_mtp_tensors(config) | optional_mtp_tensors(config)
    shapes = expected_tensors(config) | {name: shape for name, shape in mtp.items() if name in tensors}
    for name, shape in shapes.items():
        count = 1
        for size in shape:
            count *= size
        rows[kind_of(name, layers)]["parameters"] += count
    for name, ref in tensors.items():
        row = rows[kind_of(name, layers)]
        row["tensors"] += 1
        row["bytes"] += ref.nbytes
        row["dtypes"][ref.dtype] = row["dtypes"].get(ref.dtype, 0) + ref.nbytes
    for row in rows.values():
        row["dtypes"] = dict(sorted(row["dtypes"].items(), key=lambda item: -item[1]))
        if row["parameters"] and row["bytes"]:
            row["bits_per_weight"] = round(8 * row["bytes"] / row["parameters"], 3)
    return [row for row in rows.values() if row["tensors"] or row["parameters"]]


def _parameters(config: ModelConfig, kinds: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    by_kind = {row["kind"]: row["parameters"] for row in kinds}
    total = sum(by_kind.values())
    without_mtp = total - by_kind.get("MTP", 0)
    unused = config.n_routed_experts - config.num_experts_per_tok
    active = without_mtp - by_kind.get("routed experts", 0) * unused // config.n_routed_experts
    # A tied table is also the head, which every token multiplies by.
    embeddings = 0 if config.tie_word_embeddings else by_kind["embeddings"]
    return {
        "total": total,
        "without_mtp": without_mtp,
        "active": active,
        "active_without_embeddings": active - embeddings,
    }


def _name(checkpoint: Checkpoint) -> str:
    if checkpoint.gguf_metadata is not None:
        name = checkpoint.gguf_metadata.get("general.name")
        return name if isinstance(name, str) and name else checkpoint.path.name
    hub = _HUB_SNAPSHOT.search(str(checkpoint.path))
    return f"{hub[1]}/{hub[2]}" if hub else checkpoint.path.resolve().name


def _has_chat_template(checkpoint: Checkpoint) -> bool:
    from glmlocal.formats.index import read_json_object

    if checkpoint.gguf_metadata is not None:
        return bool(checkpoint.gguf_metadata.get("tokenizer.chat_template"))
    if any((checkpoint.directory / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    tokenizer_config: Path = checkpoint.directory / "tokenizer_config.json"
    return tokenizer_config.is_file() and bool(read_json_object(tokenizer_config).get("chat_template"))


def _print(facts: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    # In a file or pipe a line stays a line, whatever its length.
    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 240)
    about = Table(show_header=False, box=None, pad_edge=False)
    about.add_column(style="dim", no_wrap=True)
    about.add_column(overflow="fold")
    for label, text in _lines(facts):
        about.add_row(label, one_line(text))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("tensors", "dtype"):
        table.add_column(heading, overflow="fold")
    for heading in ("parameters", "bytes", "bits/weight"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in facts["tensors"]:
        bits = row["bits_per_weight"]
        table.add_row(
            row["kind"],
            one_line(_dtypes(row)),
            format_count(row["parameters"]),
            format_bytes(row["bytes"]),
            "" if bits is None else f"{bits:.2f}",
        )
    console.print(about)
    console.print()
    console.print(table)


def _lines(facts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    parameters, layers, experts, attention = (facts[k] for k in ("parameters", "layers", "experts", "attention"))
    yield "name", facts["name"]
    yield "path", facts["path"]
    yield "architecture", f"{facts['architecture']} ({facts['format']})"
    if facts["problem"]:
        yield "cannot run", facts["problem"]
    with_mtp = parameters["total"] != parameters["without_mtp"]
    mtp_note = f" (without MTP {parameters['without_mtp']:,})" if with_mtp else ""
    yield "parameters", f"{parameters['total']:,}{mtp_note}"
    without = parameters["active_without_embeddings"]
    note = f" ({format_count(without)} without the embedding table)" if without != parameters["active"] else ""
    yield "active per token", f"{format_count(parameters['active'])}{note}"
    yield "layers", f"{layers['total']}: {layers['dense']} dense, {layers['moe']} MoE"
    groups = f", {experts['groups_used']} of {experts['groups']} groups" if experts["groups"] > 1 else ""
    yield (
        "experts",
        (f"{experts['routed']} routed, {experts['per_token']} per token, {experts['shared']} shared{groups}"),
    )
    yield (
        "sizes",
        (
            f"hidden {facts['hidden_size']}, dense FFN {facts['intermediate_size']}, "
            f"expert FFN {facts['moe_intermediate_size']}, vocabulary {facts['vocab_size']}"
        ),
    )
    extras = [word for word, given in (("biases", attention["bias"]), ("qk-norm", attention["qk_norm"])) if given]
    yield (
        "attention",
        (
            f"{attention['heads']} heads of {attention['head_dim']} ({attention['rotary_dim']} rotary), "
            f"{attention['kv_heads']} for keys and values{''.join(', ' + word for word in extras)}"
        ),
    )
    kv = facts["kv_bytes_per_token"]
    at_16_bits = "" if kv["dtype"] == "bf16" else f"; {kv['16bit']:,} at 16 bits"
    full = format_bytes(kv["used"] * facts["context"])
    yield "context", f"{facts['context']:,} tokens"
    yield "KV cache", f"{kv['used']:,} bytes per token ({kv['dtype']}{at_16_bits}), {full} for the whole context"
    yield "MTP", _mtp(facts["mtp"])
    yield "stop tokens", ", ".join(map(str, facts["eos_token_ids"])) or "none"
    yield "chat template", "yes" if facts["chat_template"] else "no"
    files = facts["files"]
    names = files[0]["name"] if len(files) == 1 else f"{files[0]['name']} … {files[-1]['name']}"
    yield "files", f"{len(files)} ({names}), {format_bytes(facts['bytes']['files'])}"


def _mtp(mtp: Mapping[str, Any]) -> str:
    if not mtp["present"]:
        return "no"
    if not mtp["usable"]:
        return f"not usable: {mtp['problem']}"
    copies = [what for what in ("embedding", "head") if mtp[f"{what}_copy"]]
    return f"yes, {mtp['layers']} layer" + (f", with copies of {' and '.join(copies)}" if copies else "")


def _dtypes(row: Mapping[str, Any]) -> str:
    """``Q4_K 87 %, Q6_K 13 %`` by bytes, or the one there is."""
    dtypes = row["dtypes"]
    if len(dtypes) <= 1:
        return "".join(dtypes) or "missing"
    shares = {dtype: f"{100 * nbytes / row['bytes']:.0f}" for dtype, nbytes in dtypes.items()}
    return ", ".join(f"{dtype} {'<1' if share == '0' else share} %" for dtype, share in shares.items())
