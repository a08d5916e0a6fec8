"""Compile the Triton kernels to machine code of sm_90; needs no GPU (see test_gpu.py)."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dropbydrop.kernels.gpu import triton_kernels as k
from dropbydrop.search import triton_beam

CODES = {f"c{m}": "*u8" for m in range(1, 9)}


def sizes(*names):
    return dict.fromkeys(names, "i32")


def variants():
    """(kernel, types of its arguments, compile-time constants): each kernel, each type once."""
    tables = {"tables": "*fp16", "scales": "*fp16"}
    for t, planes in (("bf16", 4), ("fp32", 1)):
        whole = {**CODES, **tables, "out": f"*{t}", **sizes("rows", "groups")}
        yield k.decode, whole, {"P": planes, "R": 16, "B": 64}
        few = {"x": f"*{t}", **CODES, "tables": "*fp32" if planes == 1 else "*fp16"}
        few |= {"out": "*fp32", **sizes("n", "rows", "groups", "length")}
        yield k.product, few, {"P": planes, "R": 32, "B": 32, "WIDE": False}
    search = dict.fromkeys(("targets", "books", "pulls", "totals", "lambdas", "costs"), "*fp32")
    search |= {"at": "*i32", "codes": "*i32", **sizes("rows", "beam")}
    yield triton_beam._stages, search, {"PLANES": 4, "LEVELS": 3, "B": 16, "HALF": 128}
    ends = {"part": "*fp32", "scales": "*fp16", "bias": "*bf16", "out": "*bf16"}
    yield k.finish, ends | sizes("n", "rows", "splits"), {"BIAS": True, "R": 128}
    for a, b in ((1, 8), (64, 128)):
        pointers = {"x": "*bf16", "signs": "*fp32", "high": "*fp32", "low": "*fp32"}
        tile = {"A": a, "B": b, "AP": max(16, a), "BP": max(16, b)}
        yield k.mix, {**pointers, "out": "*fp32", **sizes("odd")}, tile
    pointers = {"x": "*fp32", "factor": "*fp32", "out": "*bf16"}
    yield k.spread, pointers | sizes("odd", "size"), {"OP": 16, "S": 32}
    pointers = {"x": "*bf16", "weight": "*i8", "scales": "*fp16", "bias": "*bf16", "out": "*bf16"}
    constants = {"BIAS": False, "R": 64, "D": 128, "WIDE": False}
    yield k.rows, pointers | sizes("n", "count", "d"), constants


def main() -> None:
    for kernel, types, constants in variants():
        signature = types | dict.fromkeys(constants, "constexpr")
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, places)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        used = compiled.metadata.shared
        assert compiled.asm["cubin"], kernel
        print(f"compiled {kernel.__name__} {constants}: {used} bytes of shared memory", flush=True)


if __name__ == "__main__":
    main()
