"""The Python API in twenty lines: ``python examples/infer_cli.py demo "What is the capital of France?"``"""

from __future__ import annotations

import sys

from glmlocal import LLM

model, question = sys.argv[1:] if len(sys.argv) == 3 else ("demo", "What is the capital of France?")

with LLM(model, context=2048) as llm:
    messages = [{"role": "user", "content": question}]
    for delta in llm.chat(messages, stream=True, temperature=0.0, max_tokens=100):
        print(delta.text, end="", flush=True)
        if delta.completion is not None:
            usage, timings = delta.completion.usage, delta.completion.timings
            print(f"\n[{usage.completion_tokens} tokens, {timings.decode_tokens_per_s:.1f} tok/s]")

    messages += [{"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And of Spain?"}]
    print(llm.chat(messages, temperature=0.0, max_tokens=100).text)  # all at once
    print(llm.generate("Once upon a time", seed=7, max_tokens=30).text)  # raw completion
    print(tuple(llm.logits(llm.tokenizer.encode("Paris is")).shape))  # fp32 [tokens, vocab]
