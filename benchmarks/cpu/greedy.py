"""Greedy decoding by the native kernels against the reference path, token for token.

    python benchmarks/cpu/greedy.py CHECKPOINT [--bits 2,3,4] [--tokens 128]

Every prompt is continued by the native step, one token at a time. The reference is the dense model
of the same level, reading the whole sequence at once: at every position its largest logit must be
that of the token chosen, unless its two largest are closer than --tie. Counts tokens,
ties, and differences, which must be 0; the last line is one JSON object.
"""

import argparse
import copy
import json
import sys

import torch
from transformers import AutoTokenizer

import dropbydrop
from dropbydrop.runtime import fused_decode

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the sea,",
    "The three most important inventions of the nineteenth century were",
    "Dear Sir or Madam, I am writing to",
    "A binary search tree is a data structure",
    "In 1969, the first humans",
)


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--bits", default="2,3,4")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tie", type=float, default=0.02, help="in logits")
    args = parser.parse_args()
    levels, dtype = [int(b) for b in args.bits.split(",")], getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    top = dropbydrop.load(args.checkpoint, bits=max(levels), dtype=dtype)
    result: dict = {"checkpoint": args.checkpoint, "dtype": args.dtype, "tie": args.tie, "bits": {}}
    print("bits   tokens   ties  differences  smallest gap of a difference")
    failed = False
    for bits in levels:
        view = dropbydrop.view(top, bits)
        if not fused_decode.native(view):
            print(f"{bits} bits: {fused_decode.how(view)}", file=sys.stderr)
            return 2
        view.generation_config.eos_token_id = None  # every prompt gives --tokens tokens
        reference = copy.deepcopy(view)
        reference.dequantize()
        tokens = ties = 0
        wrong: list[float] = []
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            out = view.generate(
                ids, max_new_tokens=args.tokens, do_sample=False,
                cache_implementation="static", disable_compile=True, pad_token_id=0,
            )  # fmt: skip
            logits = reference(input_ids=out[:, :-1]).logits[0, ids.shape[1] - 1 :].float()
            chosen = out[0, ids.shape[1] :]
            two = logits.topk(2).values
            gap = two[:, 0] - two[:, 1]
            other = logits.argmax(-1) != chosen
            tokens += len(chosen)
            ties += int((other & (gap < args.tie)).sum())
            wrong += gap[other & (gap >= args.tie)].tolist()
        failed |= bool(wrong)
        result["bits"][str(bits)] = {"tokens": tokens, "ties": ties, "differences": wrong}
        print(
            f"{bits:4}{tokens:9}{ties:7}{len(wrong):13}" + (f"{min(wrong):30.3f}" if wrong else "")
        )
    print(json.dumps(result))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
