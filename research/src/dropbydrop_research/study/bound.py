"""Study `bound`: how far is each matrix from what a Gaussian source allows at its rate?

Per matrix, from its own undamped H and row variances, reverse water-filling gives the least
weighted error of any code for the ensemble N(0, sigma_r^2 I) at the bits a weight that are really
spent. Beside it: what a checkpoint reaches at each level, and the gap in dB and in bits (by
inverting R(D); 6.02 dB a bit is wrong where components are inactive).

How to read it:
- A bound for the ensemble, not for one matrix. Among sources with these second moments the
  Gaussian is the hardest, so where the premise fails a code may get below; by at most `negentropy`
  bits a weight, as far as weights are independent. `premises` says which fail where.
- H comes from finitely many tokens. The bound of the sampled H is too low on average, that of
  held-out energies along its eigenvectors too high; the population's is between
  (theory.water_filling.cross_spectrum).
- A part of the gap is structural: no code of 8-dimensional vectors reaches the bound on a white
  source. `STRUCTURAL` has what 256-entry additive codes reach there; at high rate any free
  codebook of dimension 8 stays 1.38 dB away (theory.vector_loss). Trellis codes, which have no
  such dimension, lose less.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.system.digest import model_digest
from dropbydrop.system.errors import FormatError
from dropbydrop_research.theory import (
    E8_SECOND_MOMENT,
    GaussianSource,
    cross_spectrum,
    eigenbasis,
    fit_gaussian,
    fixed_rate_loss,
    matched_spectrum,
    row_variances,
    weighted_distortion,
)

from .data import GramFolder, GroupGram, Progress, finite, read_weight

STRUCTURAL = {
    "dedicated": {1: 0.3244, 2: 0.0945, 3: 0.0274, 4: 0.0079},
    "nested": {1: 0.3476, 2: 0.1019, 3: 0.0298, 4: 0.0091},
    "trellis": {1: 0.2662, 2: 0.0692, 3: 0.0185, 4: 0.0050},
}
"""Relative MSE on white noise at 1..4 bits, measured on test vectors: of additive codes (g = 8,
K = 256), codebooks trained for that level alone, and one nested set for all four (lambda = 1 / D);
and of nested trellis codes with windows of 12 bits, as their universal sets note."""

# When a premise counts as failed. Numbers stand beside each, so that a reader can judge.
MAX_OUTLIER = 3.0  # times the largest weight that a Gaussian matrix of this size would have
MAX_NEGENTROPY = 0.01  # bits a weight
MAX_ALIGNED_DB = 0.5  # change of the bound by the energies of W along the eigenvectors of H
MIN_RANK = 0.99  # of d_in
MIN_SAMPLES = 10  # tokens for each input
MAX_BRACKET_DB = 1.0  # between the bounds of sampled and held-out energies
FLOAT32 = torch.finfo(torch.float32).eps


def run(
    folder: Path,
    grams: GramFolder,
    rates: Mapping[int, float],
    *,
    errors: Mapping[str, Mapping[int, float]] | None = None,
    reconstruct: Callable[[str, int], Tensor] | None = None,
    structural: str = "dedicated",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Bound, reached error, gap and failed premises of every matrix with a cached H.

    Args:
        folder: the unquantized model.
        grams: cached Gram matrices of its input groups (`data.collect`).
        rates: level -> bits a weight that it really spends, everything counted.
        errors: module -> level -> relative weighted error under the same H (`read_log`).
        reconstruct: W^ float [d_out, d_in] of (module, level), in the original input space. When
            given, reached errors are computed here, under the cached H and the held-out one, and
            `errors` is not used.
        structural: key of `STRUCTURAL`: whose structural loss is set beside the bound.

    Returns:
        {"model", "rates", "structural" (as given), "structural_db", "high_rate_floor_db",
        "matrices": […], "skipped" (all zero), "summary", "ranking"}; see `_matrix` and `_ranking`.
        Errors and bounds are relative to tr(W H W^T).

    Raises:
        FormatError: no cached statistics, or statistics of another model.
    """
    if not len(grams):
        raise FormatError(f"{grams.folder} holds no cached Gram matrices; collect them first.")
    runner, model = BlockRunner.open(folder), model_digest(folder)
    matrices: list[dict[str, Any]] = []
    skipped: list[str] = []
    for i, group in enumerate(grams):
        if progress:
            progress(i, len(grams), group.name)
        if group.model not in ("", model):
            raise FormatError(
                f"the statistics in {grams.folder} are those of another model than {folder}; "
                "collect them again."
            )
        lam, vectors = eigenbasis(group.gram)
        cross = None if group.held is None else cross_spectrum(vectors, group.held)
        for module in group.modules:
            weight = read_weight(runner, module)
            if not bool(weight.any()) or not float(lam[0]) > 0:
                skipped.append(module)  # nothing to code, or inputs that are always zero
                continue
            entry = _matrix(module, weight, group, (lam, vectors), cross, rates)
            for level, data in entry["levels"].items():
                _reach(data, entry, weight, group, int(level), lam, errors, reconstruct)
            entry["premises"] = _premises(entry)
            matrices.append(entry)
    if progress:
        progress(len(grams), len(grams), "")
    if not matrices:
        raise FormatError(f"every matrix of {folder} with statistics in {grams.folder} is zero.")
    return {
        "model": folder.name,
        "rates": {str(level): bits for level, bits in rates.items()},
        "structural": structural,
        "structural_db": {
            kind: {str(p): _db(d * 4.0**p) for p, d in table.items()}
            for kind, table in STRUCTURAL.items()
        },
        "high_rate_floor_db": _db(fixed_rate_loss(8, E8_SECOND_MOMENT)),
        "matrices": matrices,
        "skipped": skipped,
        "summary": {str(level): _summary(matrices, str(level), structural) for level in rates},
        "ranking": {str(level): _ranking(matrices, str(level), structural) for level in rates},
    }


def read_log(path: Path) -> dict[str, dict[int, float]]:
    """Relative weighted errors of a quantization log: module -> level -> error.

    One JSON object a line with `module` and `rel_error`, an object of level -> error. Other lines
    and fields are ignored.

    Raises:
        FormatError: not readable, not JSON lines, or without a single error.
    """
    found: dict[str, dict[int, float]] = {}
    try:
        for line in path.read_text().splitlines():
            record = json.loads(line) if line.strip() else {}
            if "module" in record and "rel_error" in record:
                levels = record["rel_error"].items()
                found[record["module"]] = {int(p): float(error) for p, error in levels}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path} is not a quantization log ({error}).") from error
    if not found:
        raise FormatError(f"{path} has no errors of matrices; quantize with this version again.")
    return found


def structural_db(bits: float, kind: str = "dedicated") -> float:
    """Loss of 8-dimensional additive codes on a white source at `bits`, in dB.

    Linear between the measured whole rates, constant outside of them.
    """
    table = STRUCTURAL[kind]
    low = min(max(math.floor(bits), min(table)), max(table) - 1)
    at = [_db(table[p] * 4.0**p) for p in (low, low + 1)]
    return at[0] + (at[1] - at[0]) * min(max(bits - low, 0.0), 1.0)


def _db(ratio: float) -> float:
    return 10 * math.log10(ratio)


def _matrix(
    module: str,
    weight: Tensor,
    group: GroupGram,
    basis: tuple[Tensor, Tensor],
    cross: Tensor | None,
    rates: Mapping[int, float],
) -> dict[str, Any]:
    """Everything about one matrix that needs no code."""
    rows = row_variances(weight)
    lam, vectors = basis
    source = GaussianSource(lam, rows)
    matched = GaussianSource(matched_spectrum(weight, lam, vectors), rows)
    zero = torch.zeros_like(weight)
    energy = weighted_distortion(weight, zero, group.gram)
    held = None
    held_energy = 0.0
    if cross is not None and group.held is not None:
        held = GaussianSource(cross, rows)
        held_energy = weighted_distortion(weight, zero, group.held)
    fit = fit_gaussian(weight, by_row=True)
    levels = {}
    for level, bits in rates.items():
        filling = source.fill(bits)
        levels[str(level)] = {
            "bits": bits,
            "bound": source.distortion(bits) / energy,
            "bound_optimal": source.distortion(bits, "optimal") / energy,
            "bound_matched": matched.distortion(bits) / energy,
            "bound_held_out": held.distortion(bits) / held_energy if held else None,
            "active": int(filling.active.sum()),
            "resolved": filling.level > FLOAT32 * float(lam[0]),
            # what one more bit would still buy an ideal code; 6.02 dB when all are active
            "next_bit_db": _db(source.distortion(bits) / source.distortion(bits + 1)),
        }
    return {
        "module": module,
        "input_group": group.name,
        "shape": list(weight.shape),
        "tokens": group.tokens,
        "energy": energy,
        "held_energy": held_energy if held else None,
        "energy_ratio": energy / source.power,
        "rank": int((lam > FLOAT32 * float(lam[0])).sum()),
        "top_share": float(lam[0] / lam.sum()),
        "max_over_rms": fit.max_over_rms,
        "expected_max_over_rms": fit.expected_max_over_rms,
        "kurtosis": fit.kurtosis,
        "negentropy": fit.negentropy,
        "levels": levels,
    }


def _reach(
    data: dict[str, Any],
    entry: dict[str, Any],
    weight: Tensor,
    group: GroupGram,
    level: int,
    lam: Tensor,
    errors: Mapping[str, Mapping[int, float]] | None,
    reconstruct: Callable[[str, int], Tensor] | None,
) -> None:
    """Add what a checkpoint reaches at one level, and its gap to the bound."""
    reached, held = None, None
    if reconstruct is not None:
        w_hat = reconstruct(entry["module"], level)
        reached = weighted_distortion(weight, w_hat, group.gram) / entry["energy"]
        if group.held is not None:
            held = weighted_distortion(weight, w_hat, group.held) / entry["held_energy"]
    elif errors is not None:
        reached = errors.get(entry["module"], {}).get(level)
    data["reached"], data["reached_held_out"] = reached, held
    data["gap_db"] = data["gap_bits"] = None
    if reached is not None and reached > 0 and data["bound"] > 0:
        gap = GaussianSource(lam, row_variances(weight)).gap(
            reached * entry["energy"], data["bits"]
        )
        data["gap_db"], data["gap_bits"] = gap.db, finite(gap.bits)


def _premises(entry: dict[str, Any]) -> list[dict[str, str]]:
    """Which premises of the bound fail for this matrix, each with its evidence."""
    failed: list[tuple[str, str]] = []
    d_in, tokens, levels = entry["shape"][1], entry["tokens"], entry["levels"].items()
    peak, expected = entry["max_over_rms"], entry["expected_max_over_rms"]
    if peak > MAX_OUTLIER * expected:
        failed.append(("outliers", f"largest weight {peak:.1f} rms of its row, not {expected:.1f}"))
    if entry["negentropy"] > MAX_NEGENTROPY:
        text = (
            f"negentropy {entry['negentropy']:.3f} bits a weight, kurtosis {entry['kurtosis']:.2f}"
        )
        failed.append(("not Gaussian", text))
    aligned = max((_db(d["bound_matched"] / d["bound"]) for _, d in levels if d["bound"]), key=abs)
    if abs(aligned) > MAX_ALIGNED_DB:
        failed.append(("aligned", f"weights aligned with H move the bound by {aligned:+.1f} dB"))
    if entry["rank"] < MIN_RANK * d_in:
        failed.append(("rank-deficient", f"H has rank {entry['rank']} of {d_in} in float32"))
    if tokens < MIN_SAMPLES * d_in:
        failed.append(("under-sampled", f"H comes from {tokens} tokens for {d_in} inputs"))
    brackets = [_db(d["bound_held_out"] / d["bound"]) for _, d in levels if d["bound_held_out"]]
    if brackets and max(map(abs, brackets)) > MAX_BRACKET_DB:
        worst = max(brackets, key=abs)
        failed.append(("held-out", f"held-out bound {worst:+.1f} dB from that of the sampled H"))
    if unresolved := [level for level, data in levels if not data["resolved"]]:
        failed.append(
            (
                "unresolved",
                f"water level below float32 rounding of H at {', '.join(unresolved)} bits",
            )
        )
    beaten = [(p, -d["gap_db"]) for p, d in levels if d["gap_db"] is not None and d["gap_db"] < 0]
    if beaten:
        found = ", ".join(f"{db:.2f} dB at {level} bits" for level, db in beaten)
        failed.append(("beaten", f"reached errors below the bound: {found}"))
    return [{"premise": name, "found": text} for name, text in failed]


def _summary(matrices: list[dict[str, Any]], level: str, structural: str) -> dict[str, Any]:
    """Means over matrices, each weighted by its number of weights."""
    sizes = [math.prod(m["shape"]) for m in matrices]
    table: dict[str, Any] = {}
    for key in ("bound", "bound_held_out", "reached", "reached_held_out", "gap_db", "gap_bits"):
        pairs = [(m["levels"][level][key], s) for m, s in zip(matrices, sizes, strict=True)]
        known = [(v, s) for v, s in pairs if v is not None]
        total = sum(s for _, s in known)
        table[key] = sum(v * s for v, s in known) / total if total else None
    table["structural_db"] = structural_db(matrices[0]["levels"][level]["bits"], structural)
    table["premises_failed"] = sum(bool(m["premises"]) for m in matrices)
    return table


def _ranking(matrices: list[dict[str, Any]], level: str, structural: str) -> list[dict[str, Any]]:
    """What is left to gain at a level, most first; empty without reached errors.

    `excess` = relative error above the bound, what a better code could still remove;
    `attainable` = excess above the bound plus the structural loss;
    `next_bit` = relative error that one more bit a weight removes if the gap stays.
    """
    found = []
    for m in matrices:
        data = m["levels"][level]
        if data["reached"] is None:
            continue
        floor = data["bound"] * 10 ** (structural_db(data["bits"], structural) / 10)
        found.append(
            {
                "module": m["module"],
                "reached": data["reached"],
                "excess": data["reached"] - data["bound"],
                "attainable": data["reached"] - floor,
                "next_bit": data["reached"] * (1 - 10 ** (-data["next_bit_db"] / 10)),
                "gap_db": data["gap_db"],
                "gap_bits": data["gap_bits"],
            }
        )
    return sorted(found, key=lambda r: -r["excess"])
