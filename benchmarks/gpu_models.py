"""The steps of benchmarks/gpu.py that need a model: quantize, generate, smollm2, tuned."""

from __future__ import annotations

import json
import pydoc_data.topics
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import dropbydrop
from dropbydrop.checkpoint import (
    CheckpointWriter,
    Embeddings,
    PlaneSpec,
    QuantizationConfig,
    StoredGroup,
)
from dropbydrop.coding.codebooks import UNIVERSAL, universal_set
from dropbydrop.coding.rotation import Rotation

if TYPE_CHECKING:
    from gpu import Models
    from gpu_timing import Bench

LEVELS = (2, 3, 4)


class Unavailable(Exception):
    """A step cannot run here, for a reason that is no failure of it."""


class Measured(Exception):
    """Leaves a checkpoint that is only written to be timed."""


def llama(b: Bench, blocks: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A transformers Llama of the run's shape with random weights, on the run's device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    s = b.sizes
    config = LlamaConfig(
        vocab_size=s.vocab,
        hidden_size=s.hidden,
        intermediate_size=s.inner,
        num_hidden_layers=blocks,
        num_attention_heads=s.heads,
        num_key_value_heads=s.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    with torch.device(b.device):
        return LlamaForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def random_checkpoint(b: Bench, folder: Path, blocks: int) -> Path:
    """A checkpoint of the run's shape with random codes: what loading and decoding need."""
    model = llama(b, blocks).cpu()
    planes = [PlaneSpec() for _ in range(LEVELS[-1])]
    input_groups: list[StoredGroup] = []
    with CheckpointWriter(folder) as writer:
        writer.add_codebook_set(UNIVERSAL, list(universal_set(LEVELS)))
        for i in range(blocks):
            place = f"model.layers.{i}"
            for kind, parts in (("self_attn", "q k v"), ("self_attn", "o"),
                                ("mlp", "gate up"), ("mlp", "down")):  # fmt: skip
                names = [f"{place}.{kind}.{part}_proj" for part in parts.split()]
                d_in = model.get_submodule(names[0]).in_features
                turn = Rotation.make(d_in, seed=len(input_groups))
                input_groups.append(
                    StoredGroup(names[0], tuple(names), d_in, UNIVERSAL, turn.spec())
                )
                writer.add_group(input_groups[-1], turn)
                for name in names:
                    rows = model.get_submodule(name).out_features
                    codes = [
                        torch.randint(0, 256, (rows, d_in // 8), dtype=torch.uint8) for _ in planes
                    ]
                    writer.add_linear(name, codes, torch.full((rows,), 0.02))
        outer = ("model.embed_tokens", "lm_head")
        for name in outer:
            writer.add_embedding(name, model.get_submodule(name).weight, 8)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                writer.add_tensor(name, parameter.detach())
        quantization = QuantizationConfig(
            LEVELS[-1], LEVELS, tuple(planes), tuple(input_groups), Embeddings(8, outer, False), {}
        )
        config = json.loads(model.config.to_json_string(use_diff=False))
        config["architectures"] = [type(model).__name__]
        total = sum(parameter.numel() for parameter in model.parameters())
        return writer.finish(config, quantization, {}, {"total": total})


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

    out: dict[str, Any] = {}
    few, more = (2, 4) if b.cuda else (1, 2)
    with tempfile.TemporaryDirectory() as folder:
        for label in ("bf16", "2 bits"):
            spent = []
            for blocks in (few, more):
                if label == "bf16":
                    model = llama(b, blocks)
                else:
                    place = random_checkpoint(b, Path(folder) / str(blocks), blocks)
                    model = dropbydrop.load(place, bits=2, device=b.device)
                spent.append(token(model))
                del model
                torch._dynamo.reset()  # this model's graphs and their memory
            block = (spent[1] - spent[0]) / (more - few)
            total = spent[1] + block * (b.sizes.blocks - more)
            out[label] = {
                "ms_a_block": block * 1e3,
                f"extrapolated_ms_for_{b.sizes.blocks}_blocks": total * 1e3,
            }
    return out


@torch.no_grad()
def quantize(b: Bench) -> dict[str, Any]:
    """Seconds of one block through chain, H and search; extrapolated to the model."""
    from dropbydrop.coding.codebooks import default_lambdas
    from dropbydrop.coding.encoder import EFFORTS, encode_group
    from dropbydrop.models.block_runner import BlockRunner
    from dropbydrop.quantization.encode_blocks import Run

    s = b.sizes
    codebooks = universal_set(LEVELS)
    small = 128 if b.cuda else 16
    gram = torch.eye(small, device=b.device)
    weight = torch.randn(small, small, device=b.device)
    start = time.perf_counter()  # compiles kernels and starts libraries, once a run
    rotation = Rotation.make(small, seed=0).to(b.device)
    on_device, effort = codebooks.to(b.device), EFFORTS["balanced"]
    encode_group({"": weight}, gram, rotation, on_device, LEVELS, default_lambdas(LEVELS), effort)
    b.synchronize()
    warm = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        llama(b, 1).cpu().save_pretrained(Path(folder) / "model")
        if b.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        runner = BlockRunner.open(Path(folder) / "model", device=b.device)
        ids = torch.randint(0, s.vocab, (s.windows, s.seq_len), device=b.device)
        hidden = runner.embed(ids)
        marks = [time.perf_counter()]
        with suppress(Measured), CheckpointWriter(Path(folder) / "out") as writer:
            writer.add_codebook_set(UNIVERSAL, list(codebooks))
            run = Run(runner, writer, LEVELS, codebooks, effort, 0, None)
            block = runner.block(0)
            statistics = runner.collect_statistics(0, block, hidden, out=hidden)
            b.synchronize()
            marks.append(time.perf_counter())
            run.encode_block(0, block, statistics)
            b.synchronize()
            marks.append(time.perf_counter())
            raise Measured
    chain, encode = marks[1] - marks[0], marks[2] - marks[1]
    return {
        "preset": "balanced",
        "compile_s_once": warm,
        "chain_s_a_block": chain,
        "encode_s_a_block": encode,
        "seconds_a_matrix": {line["module"]: line["seconds"] for line in run.tally.log},
        "mean_relative_error": run.tally.mean_errors(),
        "peak_device_gib": torch.cuda.max_memory_allocated() / 2**30 if b.cuda else None,
        f"extrapolated_minutes_for_{s.blocks}_blocks": (warm + (chain + encode) * s.blocks) / 60,
    }


def levels_of(b: Models, folder: Path, text: Path | None) -> dict[str, Any]:
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


def smollm2(b: Models) -> dict[str, Any]:
    """`--model` quantized with --preset best on the device: seconds, memory, table of levels."""
    from dropbydrop.quantization.pipeline import quantize as run

    folder = b.folder("best")
    report = run(
        b.model, folder, LEVELS, preset=b.preset, windows=b.calibration, device=str(b.device),
        overwrite=True, progress=False,
    )  # fmt: skip
    return {"model": b.model, "report": report.to_dict()} | levels_of(b, folder, b.text)


def tuned(b: Models) -> dict[str, Any]:
    """The checkpoint of `smollm2` fine-tuned on the device, and its table of levels."""
    try:
        from dropbydrop.tuning import tune
    except ImportError as error:
        raise Unavailable(f"this version has no fine-tuning ({error})") from error
    source, folder = b.folder("best"), b.folder("tuned")
    if not source.is_dir():
        raise Unavailable("the step smollm2 has left no checkpoint; run it with the same --work")
    start = time.perf_counter()
    tune(source, folder, model=b.model, device=str(b.device), overwrite=True, progress=False)
    return {"seconds": time.perf_counter() - start} | levels_of(b, folder, b.text)
