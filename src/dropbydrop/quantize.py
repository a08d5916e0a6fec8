"""Quantize a model into one nested checkpoint: the life-cycle around the encoder.

Steps:
    1. resolve the model, draw the calibration windows (written by the model itself by default);
    2. block by block: load its weights, run the windows through it, collecting the Gram matrix of
       every input site and the block's output in one pass; encode its matrices; write them; free
       everything. Activations are those of the unquantized model;
    3. write what stays (embeddings and head in 8 or 16 bits, norms and biases as they are),
       config, log, model card, manifest; rename the folder into place.
In memory at a time: the hidden states of the windows, one block, its Gram matrices.

Nothing is visible under OUT before the last step: bad input, an error, Ctrl-C or a full disk leave
no trace.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import __version__
from .calibration import SELF, load_windows
from .capture import Captured
from .checkpoint import CheckpointWriter, Embeddings, PlaneSpec, QuantizationConfig, SiteSpec
from .code import GROUP
from .encoder import EFFORTS, Encoded, encode_site
from .errors import DropError, PrecisionError, UnsupportedModelError
from .linear import output_scale
from .progress import progress_bar
from .report import CARD_FILE, LOG_FILE, model_card
from .rotation import Rotation
from .search import backends
from .sources import resolve
from .universal import default_lambdas, universal_set
from .walk import Walk

MAX_BITS = 8
WINDOWS = {"fast": 32, "balanced": 64, "best": 128}
SEQ_LEN = 1024
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "NOTICE",
)


@dataclass(frozen=True)
class Report:
    """What a run did. Seconds are wall-clock, memory is the peak of the whole process.

    Attributes:
        errors: mean over matrices of the relative weighted error at each level.
        kept: parameters left in 8 or 16 bits (or as they were): name, bits, reason.
    """

    out: Path
    levels: tuple[int, ...]
    seconds: dict[str, float]
    peak_gib: float
    model_gib: float
    errors: dict[int, float]
    matrices: int
    kept: list[dict[str, Any]]
    backend: str
    log: list[dict[str, Any]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, without the line-by-line log."""
        return {
            "out": str(self.out),
            "levels": list(self.levels),
            "seconds": {k: round(v, 2) for k, v in self.seconds.items()},
            "peak_gib": round(self.peak_gib, 3),
            "model_float32_gib": round(self.model_gib, 3),
            "mean_relative_error": {str(p): e for p, e in self.errors.items()},
            "matrices": self.matrices,
            "kept": self.kept,
            "backend": self.backend,
        }


def check_levels(bits: Sequence[int]) -> tuple[int, ...]:
    """Ascending levels without repeats.

    Raises:
        PrecisionError: none, or one that is not in 1..8.
    """
    levels = tuple(sorted(set(bits)))
    if not levels or any(not 1 <= p <= MAX_BITS for p in levels):
        raise PrecisionError(
            f"--bits {','.join(map(str, bits)) or '(none)'}: give levels from 1 to {MAX_BITS}, "
            "such as --bits 2,3,4. Each level is a precision that the checkpoint can be run at."
        )
    return levels


def quantize(
    model: str | Path,
    out: str | Path,
    bits: Sequence[int] = (2, 3, 4),
    *,
    calibration: str | Path = SELF,
    preset: str = "balanced",
    seed: int = 0,
    head_bits: int = 8,
    windows: int | None = None,
    seq_len: int = SEQ_LEN,
    device: str = "cpu",
    backend: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Report:
    """Quantize `model` once for all `bits`, and write the checkpoint folder `out`.

    Args:
        model: a local Hugging Face folder, a .gguf file, a hub id, or "smollm2".
        bits: the levels that are supervised and can be asked for later.
        calibration: a text or .jsonl file, or "self": text that the model writes itself.
        preset: "fast", "balanced" or "best": calibration tokens and search effort.
        head_bits: 8 (int8 rows) or 16, for embedding and head.
        windows, seq_len: calibration windows and their tokens; by default from the preset.
        device: where blocks run and matrices are encoded.
        backend: search backend by name (see `search.backends`); by default the best here.

    Raises:
        DropError: anything about the input; nothing is left behind.
    """
    started = time.perf_counter()
    levels = check_levels(bits)
    if preset not in EFFORTS:
        raise DropError(f"preset {preset!r}: choose one of {', '.join(EFFORTS)}.")
    if head_bits not in (8, 16):
        raise DropError(f"--head-bits {head_bits}: choose 8 or 16.")
    source = resolve(model)
    walk = Walk.open(source.folder, device=device)
    check_model(walk, head_bits)
    seconds = {"calibrate": 0.0, "activations": 0.0, "encode": 0.0, "write": 0.0}
    with CheckpointWriter(out, overwrite=overwrite) as writer:
        mark = time.perf_counter()
        text = load_windows(
            calibration,
            source.tokenizer(),
            windows or WINDOWS[preset],
            min(seq_len, _context(walk)),
            seed,
            source=source,
        )
        seconds["calibrate"] = time.perf_counter() - mark
        codebooks = universal_set(levels)
        run = _Run(walk, writer, levels, codebooks, preset, seed, backend)
        writer.add_codebook_set("universal", list(codebooks))
        with progress_bar(progress) as bar:
            task = bar.add_task("quantize", total=walk.num_blocks)
            hidden = walk.embed(text.ids)
            for i in range(walk.num_blocks):
                mark = time.perf_counter()
                block = walk.block(i)
                captured = walk.capture(i, block, hidden, out=hidden)
                seconds["activations"] += time.perf_counter() - mark
                mark = time.perf_counter()
                run.encode_block(i, block, captured)
                walk.release(i)
                seconds["encode"] += time.perf_counter() - mark
                bar.advance(task)
        del hidden
        mark = time.perf_counter()
        embeddings, total = run.write_rest(head_bits)
        provenance = {
            "base_model": source.name,
            "calibration": dict(text.description),
            "preset": preset,
            "seed": seed,
            "lambdas": dict(zip(map(str, levels), run.lambdas, strict=True)),
            "version": __version__,
        }
        quantization = QuantizationConfig(
            bits=levels[-1],
            levels=levels,
            planes=tuple(PlaneSpec() for _ in range(levels[-1])),
            sites=tuple(run.sites),
            embeddings=embeddings,
            provenance=provenance,
        )
        config = json.loads((source.folder / "config.json").read_text())
        config.pop("_name_or_path", None)
        files: dict[str, bytes | Path] = {
            name: source.folder / name for name in _COPIED if (source.folder / name).is_file()
        }
        files[LOG_FILE] = "".join(json.dumps(line) + "\n" for line in run.log).encode()
        files[CARD_FILE] = model_card(source.name, quantization, run.mean_errors()).encode()
        path = writer.finish(config, quantization, files, {"total": total})
        seconds["write"] = time.perf_counter() - mark
    seconds["total"] = time.perf_counter() - started
    return Report(
        path,
        levels,
        seconds,
        peak_memory() / 2**30,
        4 * total / 2**30,
        run.mean_errors(),
        len(run.log),
        run.kept,
        backend or backends(device)[0],
        run.log,
    )


class _Run:
    """State of one run: what has been written, logged and left alone so far."""

    def __init__(
        self,
        walk: Walk,
        writer: CheckpointWriter,
        levels: tuple[int, ...],
        codebooks: Tensor,
        preset: str,
        seed: int,
        backend: str | None,
    ) -> None:
        self.walk, self.writer, self.levels = walk, writer, levels
        self.codebooks = codebooks.to(walk.device)
        self.effort, self.seed, self.backend = EFFORTS[preset], seed, backend
        self.lambdas = default_lambdas(levels)
        self.sites: list[SiteSpec] = []
        self.log: list[dict[str, Any]] = []
        self.kept: list[dict[str, Any]] = []
        self.parameters = 0

    def encode_block(self, i: int, block: nn.Module, captured: Captured) -> None:
        """Encode and write every matrix of block i, and the parameters that stay as they are."""
        done: set[str] = set()
        prefix = f"{self.walk.block_prefix(i)}."
        for site in captured.sites:
            rotation = Rotation.make(site.d_in, seed=self.seed * 1_000_003 + len(self.sites))
            modules: dict[str, Any] = {
                name: block.get_submodule(name.removeprefix(prefix)) for name in site.modules
            }
            weights = {name: module.weight.detach().float() for name, module in modules.items()}
            mark = time.perf_counter()
            encoded = encode_site(
                weights,
                captured.grams[site.name],
                rotation.to(self.walk.device),
                self.codebooks,
                self.levels,
                self.lambdas,
                self.effort,
                self.backend,
            )
            spent = (time.perf_counter() - mark) / len(weights)
            ratio = captured.energy_ratio[site.name]
            spec = SiteSpec(site.name, site.modules, site.d_in, "universal", rotation.spec())
            self.writer.add_site(spec, rotation)
            self.sites.append(spec)
            for name, code in encoded.items():
                bias = modules[name].bias
                self._write(name, code, None if bias is None else bias.detach().cpu())
                done |= {f"{name}.weight", f"{name}.bias"}
                self.parameters += weights[name].numel() + (0 if bias is None else bias.numel())
                self._log(name, weights[name], code, ratio, spent)
        for local, _ in block.named_parameters():
            if prefix + local not in done:
                self._keep(prefix + local, "not a matrix of a linear layer")
        for local, _ in block.named_buffers():
            if local in block.state_dict():
                self._keep(prefix + local, "a buffer")

    def _write(self, name: str, code: Encoded, bias: Tensor | None) -> None:
        codes = [plane.cpu() for plane in code.codes]
        self.writer.add_linear(name, codes, scales=code.scales.cpu(), bias=bias)

    def _log(
        self, name: str, weight: Tensor, code: Encoded, energy_ratio: float, seconds: float
    ) -> None:
        rms = float(weight.square().mean().sqrt())
        self.log.append(
            {
                "module": name,
                "shape": list(weight.shape),
                "rel_error": dict(zip(map(str, self.levels), code.errors, strict=True)),
                "max_over_rms": round(float(weight.abs().max()) / max(rms, 1e-30), 2),
                "token_energy_over_median": round(energy_ratio, 1),
                "seconds": round(seconds, 3),
            }
        )

    def _keep(self, name: str, reason: str) -> None:
        """A parameter that is stored as it is."""
        tensor = self.walk.read(name)
        self.writer.add_tensor(name, tensor)
        self.parameters += tensor.numel()
        bits = 8 * tensor.element_size()
        self.kept.append({"name": name, "bits": bits, "values": tensor.numel(), "reason": reason})

    def write_rest(self, head_bits: int) -> tuple[Embeddings, int]:
        """Embedding, head and what lies outside the blocks. Returns (spec, all parameters)."""
        walk = self.walk
        modules = [*walk.embedding_modules, *([] if walk.tied else walk.head_modules)]
        for module in modules:
            weight = walk.read(f"{module}.weight")
            self.writer.add_embedding(module, weight, head_bits)
            self.parameters += weight.numel()
            what = "head" if module in walk.head_modules else "embedding"
            reason = f"{what}{' and tied head' if walk.tied else ''}; --head-bits chooses"
            self.kept.append(
                {"name": module, "bits": head_bits, "values": weight.numel(), "reason": reason}
            )
        for name in walk.outer_names():
            if name.removesuffix(".weight") not in modules:
                self._keep(name, "outside of the decoder blocks")
        tied = walk.tied
        return Embeddings(head_bits, tuple(modules), tied), self.parameters

    def mean_errors(self) -> dict[int, float]:
        """Mean relative error over matrices at each level."""
        return {
            p: sum(line["rel_error"][str(p)] for line in self.log) / max(len(self.log), 1)
            for p in self.levels
        }


def check_model(walk: Walk, head_bits: int) -> None:
    """Refuse by name, before any work, what would fail later.

    Raises:
        UnsupportedModelError: inputs that groups do not divide, or an embedding that computes
            more than a look-up and shall have 8-bit rows.
    """
    for module in walk.embedding_modules:
        embedding = walk.model.get_submodule(module)
        if head_bits == 8 and output_scale(embedding) is None:
            raise UnsupportedModelError(
                f"{module} is a {type(embedding).__name__}, which may compute more than a look-up, "
                "so its rows cannot be stored in 8 bits; quantize this model with --head-bits 16."
            )
    prefix = f"{walk.blocks_name}."
    for name, linear in walk.model.named_modules():
        if name.startswith(prefix) and isinstance(linear, nn.Linear) and linear.in_features % GROUP:
            raise UnsupportedModelError(
                f"{name} has {linear.in_features} inputs, which is not a multiple of {GROUP}, and "
                f"codes cover groups of {GROUP} inputs. This version cannot quantize this model."
            )


def _context(walk: Walk) -> int:
    """Longest window the model takes."""
    text = walk.model.config.get_text_config()
    return int(getattr(text, "max_position_embeddings", None) or SEQ_LEN)


def peak_memory() -> int:
    """Peak resident bytes of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
