"""Compile the Triton kernels to machine code of sm_90; needs no GPU (see test_gpu.py).

Each kernel with each type once, arguments as a large model gives them: pointers and sizes divisible
by 16. What the assembler reports about it is printed, one JSON object a kernel:

    {"kernel", "constants", "shared": bytes, "registers", "spilled": bytes, "wide": 16-byte loads,
    "around": copies that bypass the first-level cache}
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dropbydrop.coding.search import triton as triton_beam
from dropbydrop.coding.trellis import triton as triton_viterbi
from dropbydrop.kernels.cuda import ops
from dropbydrop.kernels.cuda import triton_kernels as k

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def sizes(*names):
    return dict.fromkeys(names, "i32")


def codes(letters):
    return {f"{letter}{m}": "*u8" for letter in letters for m in range(1, 9)}


def variants():
    """(kernel, types of its arguments, compile-time constants, options)."""
    for t, planes in (("bf16", 4), ("fp32", 1)):
        whole = {**codes("c"), "tables": "*fp16", "scales": "*fp16", "out": f"*{t}"}
        yield k.decode, whole | sizes("rows", "groups"), {"P": planes, "R": 16, "B": 64}, {}
    for t, planes, matrices, whole in (
        ("bf16", 2, 3, True), ("bf16", 4, 2, False), ("fp16", 8, 1, True), ("fp32", 4, 1, False),
    ):  # fmt: skip
        few = {"x": f"*{t}", **codes("abc"), "tables": "*fp32" if t == "fp32" else "*fp16"}
        few |= {
            "scales": "*fp32",
            "bias": "*fp32",
            "out": f"*{t}" if whole else "*fp32",
            "n": "i32",
        }
        few |= sizes("rows_a", "rows_b", "rows_c", "groups", "length")
        tile = {"R": 32, "B": ops.width(planes, TYPES[t])}
        constants = {"P": planes, **tile, "MATRICES": matrices, "WHOLE": whole}
        yield k.product, few, {**constants, "BIAS": whole, "WIDE": False}, {"num_stages": 1}
    books = dict.fromkeys(("own", "pulled", "books", "codebooks", "part", "error"), "*fp32")
    books |= {"chosen": "*u8", "moved": "*i32", "pulls": "*fp32", "totals": "*fp32"}
    books |= {"lambdas": "*fp32", "at": "*i32", **sizes("rows", "groups", "j", "beam")}
    for start, b in ((True, 16), (False, 32)):
        constants = {"START": start, "PLANES": 4, "LEVELS": 3, "B": b, "HALF": 128}
        yield triton_beam.visit, books, constants, {"num_warps": triton_beam.warps(b)}
    path = {"x": "*fp32", "s": "*fp32", "table": "*fp32", "back": "*u8", "best": "*i64"}
    for states, branches in ((1 << 12, 4), (1 << 14, 2)):  # with 1 << 16 registers spill
        types = path | sizes("rows", "start")
        yield (
            triton_viterbi.forward,
            types,
            {"STATES": states, "BRANCHES": branches},
            {"num_warps": triton_viterbi.warps(states)},
        )
    types = {"back": "*u8", **dict.fromkeys(("at", "state", "found", "before"), "*i64")}
    constants = {"STAYS": 1 << 11, "BITS": 1, "WINDOW": 12}
    yield triton_viterbi.trace, types | sizes("rows", "first"), constants, {"num_warps": 1}
    ends = {"part": "*fp32", "scales": "*fp32", "bias": "*fp32", "out": "*bf16"}
    yield k.finish, ends | sizes("n", "rows", "splits"), {"BIAS": True, "R": 128}, {}
    pointers = dict.fromkeys(("signs", "factor", "high", "low"), "*fp32")
    for a, b, factor, s in ((1, 8, False, 1), (64, 64, True, 2), (64, 128, False, 1)):
        types = {"x": "*bf16", **pointers, "out": "*bf16", **sizes("count")}
        tile = {"A": a, "B": b, "AP": max(16, a), "BP": max(16, b), "FACTOR": factor, "S": s}
        yield k.mix, types, tile, {"num_warps": 4 if a * b <= 4096 else 8}
    types = {"x": "*fp32", "factor": "*fp32", "out": "*bf16"}
    yield k.spread, types | sizes("odd", "size"), {"OP": 16, "S": 32}, {}
    types = {"x": "*bf16", "weight": "*i8", "scales": "*fp16", "bias": "*bf16", "out": "*bf16"}
    constants = {"BIAS": False, "R": 64, "D": 128, "WIDE": False}
    yield k.rows, types | sizes("n", "count", "d"), constants, {}


def aligned(kernel, types):
    """Arguments that are divisible by 16, as Triton's launcher would find them."""
    apart = {"n", "odd", "beam", "splits", "count", "j"}
    return {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in types
        if name not in apart
    }


def report(ptx):
    """Registers and bytes of spills, as the assembler finds them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        target = re.search(r"\.target (\w+)", ptx).group(1)
        done = subprocess.run(
            [PTXAS, "-v", f"--gpu-name={target}", source, "-o", Path(folder) / "out"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", done.stderr)))
    return int(re.search(r"Used (\d+) registers", done.stderr).group(1)), spilled


def main() -> None:
    for kernel, types, constants, options in variants():
        signature = types | dict.fromkeys(constants, "constexpr")
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, places, aligned(kernel, types))
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.asm["cubin"], kernel
        ptx = compiled.asm["ptx"]
        registers, spilled = report(ptx)
        found = {
            "kernel": kernel.__name__,
            "constants": constants,
            "shared": compiled.metadata.shared,
            "registers": registers,
            "spilled": spilled,
            "around": ptx.count("cp.async.cg"),
            "wide": len(re.findall(r"(?:ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64)", ptx)),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
