"""The steps of benchmarks/gpu.py that quantize: search, quantize, generate, smollm2, tuned."""

from __future__ import annotations

import argparse
import pydoc_data.topics
import tempfile
import time
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

import dropbydrop
from dropbydrop.checkpoint import CheckpointWriter
from dropbydrop.coding.codebooks import UNIVERSAL, default_lambdas, universal_set
from dropbydrop.coding.encoder import EFFORTS, encode_group
from dropbydrop.coding.planes import KINDS
from dropbydrop.coding.rotation import Rotation
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.quantization.config import QuantizeConfig
from dropbydrop.quantization.encode_blocks import BlockEncoder
from random_model import LEVELS, llama_shape, random_checkpoint, random_llama

from .timing import REAL, SMOKE, Bench, Unavailable


class Measured(Exception):
    """Leaves a checkpoint that is only written to be timed."""


class ModelBench(Bench):
    """A bench that also knows the model of the last two steps."""

    def __init__(self, args: argparse.Namespace) -> None:
        sizes, megabytes = (SMOKE, 0.01) if args.smoke else (REAL, args.megabytes)
        codes = list(KINDS) if args.code is None else [args.code]
        only = None if args.kernels is None else args.kernels.split(",")
        super().__init__(args.device, sizes, megabytes, codes, only)
        self.model, self.text, self._work = args.model, args.text, args.work
        self.code = codes[0]  # of the model's checkpoint: bytes, unless --code names another
        self.windows, self.seq_len = (2, 32) if args.smoke else (16, 2048)
        self.preset, self.calibration = ("fast", 2) if args.smoke else ("best", None)

    @cached_property
    def _temporary(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory()

    def folder(self, name: str) -> Path:
        """Where a checkpoint goes."""
        root = Path(self._temporary.name) if self._work is None else self._work
        root.mkdir(parents=True, exist_ok=True)
        return root / name


def config_of(b: Bench, blocks: int) -> LlamaConfig:
    """A Llama of the run's shape."""
    return LlamaConfig(
        vocab_size=b.sizes.vocab,
        hidden_size=b.sizes.hidden,
        intermediate_size=b.sizes.inner,
        num_hidden_layers=blocks,
        num_attention_heads=b.sizes.heads,
        num_key_value_heads=b.sizes.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


@torch.no_grad()
def generate(b: Bench) -> dict[str, Any]:
    """Milliseconds a token through `generate` with a static cache, which compiles on a GPU."""
    ids = torch.randint(0, b.sizes.vocab, (1, 8), device=b.device)
    short, long = (8, 72) if b.cuda else (2, 4)

    def token(model: nn.Module) -> float:
        spent = {}
        for count in (long, short, long):  # the first compiles
            start = time.perf_counter()
            model.generate(  # type: ignore[operator]
                ids,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                cache_implementation="static",
            )
            b.synchronize()
            spent[count] = time.perf_counter() - start
        return (spent[long] - spent[short]) / (long - short)

    out = b.partial
    few, more = (2, 4) if b.cuda else (1, 2)
    with tempfile.TemporaryDirectory() as folder:
        for code in ("", *b.codes):
            spent = []
            for blocks in (few, more):
                if not code:
                    model = random_llama(config_of(b, blocks), torch.bfloat16, b.device)
                else:
                    shape = llama_shape(config_of(b, blocks))
                    place = random_checkpoint(Path(folder) / f"{code}{blocks}", shape, code=code)
                    model = dropbydrop.load(place, bits=2, dtype=torch.bfloat16, device=b.device)
                spent.append(token(model))
                del model
                torch._dynamo.reset()  # this model's graphs and their memory
            block = (spent[1] - spent[0]) / (more - few)
            total = spent[1] + block * (b.sizes.blocks - more)
            out[f"2 bits, {code}" if code else "bf16"] = {
                "ms_a_block": block * 1e3,
                f"extrapolated_ms_for_{b.sizes.blocks}_blocks": total * 1e3,
            }
    return out


def warmed(b: Bench, code: str) -> float:
    """Seconds of a tiny search, which compiles kernels and starts libraries, once a run."""
    small = 128 if b.cuda else 16
    start = time.perf_counter()
    encoded(b, code, torch.randn(small, small, device=b.device), torch.eye(small, device=b.device))
    return time.perf_counter() - start


def encoded(b: Bench, code: str, weight: Tensor, gram: Tensor) -> list[float]:
    """Search of one matrix for the levels; their relative errors."""
    effort, lambdas = EFFORTS["balanced"], default_lambdas(LEVELS)
    books = universal_set(LEVELS, kind=code, window=effort.window).to(b.device)
    rotation = Rotation.make(weight.shape[1], seed=0).to(b.device)
    found = encode_group({"": weight}, gram, rotation, books, LEVELS, lambdas, effort)
    b.synchronize()
    return list(found[""].errors)


@torch.no_grad()
def search(b: Bench) -> dict[str, Any]:
    """Seconds of one square matrix with the H of correlated inputs."""
    d = b.sizes.hidden
    x = torch.randn(2 * d, d, device=b.device)
    x[:, : d // 2] += x[:, d // 2 :]
    gram, weight = x.T @ x, torch.randn(d, d, device=b.device)
    for code in b.codes:
        warm, start = warmed(b, code), time.perf_counter()
        if b.cuda:
            torch.cuda.reset_peak_memory_stats()
        errors = encoded(b, code, weight, gram)
        b.partial[code] = {
            "compile_s_once": warm,
            "seconds": time.perf_counter() - start,
            "relative_errors": errors,
            "peak_device_gib": torch.cuda.max_memory_allocated() / 2**30 if b.cuda else None,
        }
    return b.partial


@torch.no_grad()
def quantize(b: Bench) -> dict[str, Any]:
    """Seconds of one block through chain, H and search; extrapolated to the model."""
    for code in b.codes:
        b.partial[code] = _one_block(b, code)
    return b.partial


def _one_block(b: Bench, code: str) -> dict[str, Any]:
    s, effort = b.sizes, EFFORTS["balanced"]
    codebooks = universal_set(LEVELS, kind=code, window=effort.window)
    warm = warmed(b, code)
    with tempfile.TemporaryDirectory() as folder:
        small_model = random_llama(config_of(b, 1), torch.bfloat16)
        small_model.save_pretrained(Path(folder) / "model")
        del small_model
        if b.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        runner = BlockRunner.open(Path(folder) / "model", device=b.device)
        ids = torch.randint(0, s.vocab, (s.windows, s.seq_len), device=b.device)
        hidden = runner.embed(ids)
        marks = [time.perf_counter()]
        with suppress(Measured), CheckpointWriter(Path(folder) / "out") as writer:
            writer.add_codebook_set(UNIVERSAL, codebooks)
            config = QuantizeConfig(levels=LEVELS, code=code)
            encoder = BlockEncoder(runner, writer, config, effort, codebooks)
            block = runner.block(0)
            statistics = runner.collect_statistics(0, block, hidden, out=hidden)
            b.synchronize()
            marks.append(time.perf_counter())
            encoder.encode_block(0, block, statistics)
            b.synchronize()
            marks.append(time.perf_counter())
            raise Measured
    chain, encode = marks[1] - marks[0], marks[2] - marks[1]
    return {
        "preset": "balanced",
        "compile_s_once": warm,
        "chain_s_a_block": chain,
        "encode_s_a_block": encode,
        "seconds_a_matrix": {line["module"]: line["seconds"] for line in encoder.log.matrices},
        "mean_relative_error": encoder.log.mean_errors(),
        "peak_device_gib": torch.cuda.max_memory_allocated() / 2**30 if b.cuda else None,
        f"extrapolated_minutes_for_{s.blocks}_blocks": (warm + (chain + encode) * s.blocks) / 60,
    }


def levels_of(b: ModelBench, folder: Path, text: Path | None) -> dict[str, Any]:
    """Perplexity and KL of every level of a checkpoint, as `dropbydrop eval` has them."""
    from transformers import AutoModelForCausalLM

    from dropbydrop.data.text_files import text_windows
    from dropbydrop.evaluation.perplexity import evaluate
    from dropbydrop.models.sources import load_tokenizer, resolve

    if text is None:  # prose that every interpreter has
        topics = pydoc_data.topics.topics
        text = folder.parent / "python-reference.txt"
        text.write_text("\n\n".join(topics[name] for name in sorted(topics)))
    source = resolve(b.model)
    ids, described = text_windows(text, load_tokenizer(folder), b.seq_len, b.windows)
    reference = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    base = dropbydrop.load(folder, bits=LEVELS[-1], dtype=torch.float32, device=b.device)
    models = {str(p): dropbydrop.view(base, p) for p in LEVELS}
    found = evaluate(models, reference.to(b.device).eval(), ids.to(b.device), progress=False)
    for figures in found["bits"].values():
        del figures["per_window"]
    return {"text": described, "original_ppl": found["reference"]["ppl"], "bits": found["bits"]}


def smollm2(b: ModelBench) -> dict[str, Any]:
    """`--model` quantized with --preset best on the device: seconds, memory, table of levels."""
    from dropbydrop.quantization.pipeline import quantize as run

    folder = b.folder("best")
    report = run(
        b.model, folder, LEVELS, preset=b.preset, windows=b.calibration, device=str(b.device),
        code=b.code, overwrite=True, progress=False,
    )  # fmt: skip
    return {"model": b.model, "report": report.to_dict()} | levels_of(b, folder, b.text)


def tuned(b: ModelBench) -> dict[str, Any]:
    """The checkpoint of `smollm2` fine-tuned on the device, and its table of levels."""
    try:
        from dropbydrop.tuning.pipeline import tune
    except ImportError as error:
        raise Unavailable(f"this version has no fine-tuning ({error})") from error
    source, folder = b.folder("best"), b.folder("tuned")
    if not source.is_dir():
        raise Unavailable("the step smollm2 has left no checkpoint; run it with the same --work")
    start = time.perf_counter()
    tune(source, folder, model=b.model, device=str(b.device), overwrite=True, progress=False)
    return {"seconds": time.perf_counter() - start} | levels_of(b, folder, b.text)
