"""What ``--quant`` costs: perplexity, and KL divergence from the same weights unquantized.

    python benchmarks/quantization.py            the demo, written out in BF16 first
    python benchmarks/quantization.py DIR        any unquantized checkpoint

The bundled text in windows of 512 tokens that advance by 256, as ``glmlocal eval`` scores it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmlocal import evaluate
from glmlocal.formats.index import open_checkpoint
from glmlocal.llm import LLM
from glmlocal.models.weights import WeightReader
from glmlocal.resolve import resolve

CONTEXT, STRIDE = 512, 256


def write_bf16(source: Path, directory: Path) -> None:
    """A checkpoint's tensors as BF16 safetensors under a directory; routers' biases stay F32, as in the releases."""
    import torch
    from safetensors.torch import save_file

    with open_checkpoint(source).tensors as tensors:
        read = WeightReader(tensors, lambda num_bytes: None).dense
        stored = {
            name: read(name).to(torch.float32 if name.endswith("correction_bias") else torch.bfloat16)
            for name in tensors
        }
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(open_checkpoint(source).config))


def log_probs(llm: LLM, token_ids: list[int]) -> list[NDArray[np.float32]]:
    """Of every scored token, a window at a time: [scored, vocab]."""
    out = []
    for window in evaluate.windows(len(token_ids), CONTEXT, STRIDE):
        logits = llm.logits(token_ids[window.begin : window.end - 1]).numpy()
        rows = logits[window.first_target - 1 - window.begin : window.end - 1 - window.begin]
        out.append(evaluate.log_softmax(rows).astype(np.float32))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, nargs="?", help="default: the demo in BF16")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text; default 4096")
    args = parser.parse_args()
    text = files("glmlocal").joinpath("data", "eval.txt").read_text("utf-8")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer_of = model = args.model
        if args.model is None:
            tokenizer_of, model = resolve("demo"), Path(scratch)
            write_bf16(tokenizer_of, model)
        with LLM(tokenizer_of, context=CONTEXT, max_batch=1) as llm:
            token_ids = llm.tokenizer.encode(text, add_special_tokens=True)[: args.tokens]
        targets = [
            np.asarray(token_ids[w.first_target : w.end]) for w in evaluate.windows(len(token_ids), CONTEXT, STRIDE)
        ]
        reference: list[NDArray[np.float32]] = []
        for quant in ("keep", "int8", "int4"):
            with LLM(model, context=CONTEXT, max_batch=1, quant=quant) as llm:
                rows = log_probs(llm, token_ids)
            reference = reference or rows
            nll = [evaluate.target_nll(*pair) for pair in zip(rows, targets, strict=True)]
            perplexity = evaluate.perplexity(np.concatenate(nll))
            distance = evaluate.divergence(
                [evaluate.compare_rows(*triple) for triple in zip(reference, rows, targets, strict=True)]
            )
            results[quant] = {**asdict(perplexity), **asdict(distance)}
            print(
                f"{quant:5} perplexity {perplexity.perplexity:.3f}, KL {distance.kl_mean:.2e} ± "
                f"{distance.kl_stderr:.0e} nats (99 %: {distance.kl_p99:.2e}), "
                f"same top token {distance.top1_agreement:.2%}",
                flush=True,
            )
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
