"""`llama-k`, `llama-iq`: llama.cpp's own quantizers, one file a level, with an importance matrix.

    level        2       3       4
    llama-k      Q2_K    Q3_K_M  Q4_K_M
    llama-iq     IQ2_S   IQ3_S   IQ4_XS

These names are mixtures: llama.cpp gives each tensor a type by its role, its place among the blocks
and the number of heads a key has. Both halves are its own code, called through llama-cpp-python:

1. `llama_model_quantize` quantizes a file that holds two rows of every matrix (one would be a
   vector, which stays as it is). It is thrown away; the types that it has are those that llama.cpp
   gives this model.
2. `ggml_quantize_chunk`, which the former calls for its rows, quantizes each matrix to its type.
   Rows are independent, so the bytes are those of a file that llama.cpp would write.

`gguf.dequantize` decodes them. The importance of an input is the diagonal of H, the mean square of
each column over the tokens that all methods are given; llama.cpp's own tool sums the same, without
the weights that clip a few tokens of enormous energy (models/statistics.py). Scale does not matter.

**Shapes.** Most types cover 256 inputs with one block. Where d_in is no multiple of it, llama.cpp
falls back to a type of 32 inputs and more bits: 576 inputs that Q2_K was meant for become Q4_0.
What a level consists of is told with each result ("Q4_0 for Q2_K"). `llama-k-folded` and
`llama-iq-folded` show what the types themselves can do on such a model: as many rows as make
up a multiple of 256 are quantized as one long row. Parts of 16 and 32 inputs with a scale of their
own never cross a row then; only the two 16-bit numbers of a block serve more than one row. No
program runs such a file, so these two are a bound on the method and not a choice that a user has.

The declared architecture is `llama` for every model: the choice of types depends on it for Falcon
and GLM 5 alone. Embedding and head are not in the file: they stay as they are, as for all methods.
"""

from __future__ import annotations

import ctypes
import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dropbydrop.system.errors import DropError, UnsupportedModelError

from .suite import Level, ModelShape, Suite, dedicated

MIXTURES = {
    "k": {2: "Q2_K", 3: "Q3_K_M", 4: "Q4_K_M"},
    "iq": {2: "IQ2_S", 3: "IQ3_S", 4: "IQ4_XS"},
}
_BLOCK = 256  # inputs, of the types with the largest blocks
INSTALL = 'CMAKE_ARGS="-DLLAVA_BUILD=OFF" pip install llama-cpp-python==0.3.36'


def llama(
    weights: Mapping[str, Tensor],
    gram: Tensor,
    levels: Sequence[int],
    model: ModelShape,
    family: str,
    folded: bool = False,
) -> dict[str, Suite]:
    """Quantize the matrices of an input group.

    Args:
        weights: module -> float32 [d_out, d_in]; gram [d_in, d_in] of their common input.
        model: the model they are of; decides the types.
        family: "k" or "iq", of MIXTURES.
        folded: quantize several rows as one where d_in is no multiple of 256.

    Raises:
        UnsupportedModelError: a matrix that has no name in a GGUF file.
    """
    importance = gram.diagonal().float().cpu().numpy()
    found: dict[str, dict[int, Level]] = {name: {} for name in weights}
    for p in levels:
        meant = types_of(model, MIXTURES[family][p], "any")
        types = types_of(model, MIXTURES[family][p], "folded" if folded else "stored")
        for name, weight in weights.items():
            fold = folds(weight.shape) if folded else 1
            decoded, size = _quantize(weight, importance, types[name], fold)
            kind = types[name] if types[name] == meant[name] else f"{types[name]} for {meant[name]}"
            found[name][p] = Level(decoded, size, kind)
    return {name: dedicated(suite) for name, suite in found.items()}


def folds(shape: Sequence[int]) -> int:
    """How many rows of a matrix [d_out, d_in] make a multiple of 256 inputs; 1 if none do."""
    d_out, d_in = shape
    fold = _BLOCK // int(np.gcd(d_in, _BLOCK))
    return fold if d_out % fold == 0 else 1


def _quantize(
    weight: Tensor, importance: np.ndarray[Any, Any], kind: str, fold: int
) -> tuple[Tensor, int]:
    """Decoded weights, float32 [d_out, d_in], and the bytes of the tensor in a file."""
    import gguf

    rows = np.ascontiguousarray(weight.float().cpu().numpy().reshape(-1, fold * weight.shape[1]))
    blocks = library().quantize(rows, kind, np.tile(importance, fold))
    decoded = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.array(decoded).reshape(weight.shape)).to(
        weight.device
    ), blocks.nbytes


# ---- which type each matrix gets ---------------------------------------------------------------


@lru_cache(maxsize=32)
def types_of(model: ModelShape, mixture: str, widths: str) -> dict[str, str]:
    """Module -> name of its type in a mixture such as Q4_K_M.

    Args:
        widths: "stored": rows as they are; "folded": `folds` rows as one; "any": a width that
            every type serves.

    Raises:
        UnsupportedModelError: a module that has no name in a GGUF file.
    """
    names = _gguf_names(model)
    rows = {
        names[module]: {"stored": shape[1], "folded": shape[1] * folds(shape), "any": _BLOCK}[
            widths
        ]
        for module, shape in model.modules
    }
    types = library().types(rows, model, mixture)
    return {module: types[name] for module, name in names.items()}


def _gguf_names(model: ModelShape) -> dict[str, str]:
    """Module -> what GGUF files call its matrix, "blk.0.attn_q.weight"."""
    import gguf

    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}.get(
        model.family, gguf.MODEL_ARCH.LLAMA
    )
    table = gguf.get_tensor_name_map(arch, model.blocks)
    found = {}
    for module, _ in model.modules:
        name = table.get_name(module.replace(f"{model.blocks_name}.", "model.layers.", 1))
        if name is None:
            raise UnsupportedModelError(
                f"llama.cpp's files have no name for {module} in a model of type "
                f"{model.family!r}, so its types are not known; leave the llama methods out of "
                "--methods."
            )
        found[module] = f"{name}.weight"
    return found


def write_file(path: Path, tensors: Mapping[str, np.ndarray[Any, Any]], model: ModelShape) -> None:
    """A GGUF file of these float32 tensors that `llama_model_quantize` takes."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(_BLOCK)
    writer.add_embedding_length(64 * model.heads)  # sizes that go together; none is looked at
    writer.add_rope_dimension_count(64)
    writer.add_feed_forward_length(_BLOCK)
    writer.add_vocab_size(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("no_vocab")
    writer.add_block_count(model.blocks)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- llama.cpp's libraries -----------------------------------------------------------------------


class Library:
    """The two functions of llama.cpp."""

    def __init__(self) -> None:
        import llama_cpp

        self.api = llama_cpp
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)  # kept: C has its address
        llama_cpp.llama_log_set(self._silent, None)
        base = ctypes.CDLL(str(_binary("ggml-base")))
        self._chunk = base.ggml_quantize_chunk
        self._chunk.restype = ctypes.c_size_t
        self._chunk.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
            ctypes.c_int64, ctypes.c_void_p,
        ]  # fmt: skip

    def quantize(
        self, rows: np.ndarray[Any, Any], kind: str, importance: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any]:
        """rows float32 [n, width], importance float32 [width] -> bytes [n, bytes of a row]."""
        import gguf

        number, (n, width) = gguf.GGMLQuantizationType[kind], rows.shape
        importance = np.ascontiguousarray(importance, dtype=np.float32)
        size = (
            gguf.quant_shape_to_byte_shape((width,), number)[0]
            if _packed(number)
            else (width * rows.itemsize // (2 if kind.endswith("16") else 1))
        )
        out = np.empty((n, size), np.uint8)
        parts = np.array_split(np.arange(n), min(n, torch.get_num_threads()))

        def work(part: np.ndarray[Any, Any]) -> int:
            low = int(part[0])
            source, target = rows[low:].ctypes.data, out[low:].ctypes.data
            wanted = importance.ctypes.data
            return int(self._chunk(number, source, target, 0, len(part), width, wanted))

        with ThreadPoolExecutor(len(parts)) as pool:  # ctypes lets other threads run meanwhile
            written = sum(pool.map(work, parts))
        assert written == out.nbytes, "llama.cpp and the package gguf disagree about a type's size"
        return out

    def types(self, rows: Mapping[str, int], model: ModelShape, mixture: str) -> dict[str, str]:
        """Tensor name -> type that `llama_model_quantize` gives a matrix of that many inputs."""
        import gguf

        random = np.random.default_rng(0)
        two = {name: random.standard_normal((2, d), dtype=np.float32) for name, d in rows.items()}
        even = {name: np.ones(width, np.float32) for name, width in rows.items()}
        with tempfile.TemporaryDirectory(prefix="dropbydrop-") as folder:
            source, target = Path(folder) / "rows.gguf", Path(folder) / "types.gguf"
            write_file(source, two, model)
            self.quantize_file(source, target, mixture, even)
            return {t.name: t.tensor_type.name for t in gguf.GGUFReader(str(target)).tensors}

    def quantize_file(
        self, source: Path, target: Path, mixture: str, importance: Mapping[str, Any]
    ) -> None:
        """`llama_model_quantize`; importance: tensor name -> float32 [width].

        Raises:
            DropError: it fails.
        """
        api = self.api
        entries = (api.llama_model_imatrix_data * (len(importance) + 1))()  # the last one is empty
        for entry, (name, values) in zip(entries, importance.items(), strict=False):
            entry.name, entry.size = name.encode(), len(values)
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        order = api.llama_model_quantize_default_params()
        order.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{mixture}")
        order.nthread, order.imatrix = 1, entries
        if status := api.llama_model_quantize(str(source).encode(), str(target).encode(), order):
            raise DropError(
                f"llama.cpp could not quantize two rows of each matrix to {mixture} (status "
                f"{status}); leave the llama methods out of --methods."
            )


def _packed(number: Any) -> bool:
    """Whether a type is stored in blocks, not as plain numbers."""
    import gguf

    return int(gguf.GGML_QUANT_SIZES[number][0]) > 1


@lru_cache(maxsize=1)
def library() -> Library:
    """llama.cpp; `require` says whether it is there."""
    return Library()


def require() -> None:
    """Refuse the llama methods where llama.cpp is missing.

    Raises:
        DropError: with the line that installs it.
    """
    if importlib.util.find_spec("gguf") is None:
        raise DropError("the llama methods read .gguf files: pip install 'gguf>=0.10'")
    if importlib.util.find_spec("llama_cpp") is None:
        raise DropError(
            "the llama methods are llama.cpp's own quantizers, which are not installed. With a C++ "
            f"compiler and some ten minutes for it:\n  {INSTALL}"
        )
    import llama_cpp

    if not hasattr(llama_cpp, "llama_model_imatrix_data"):
        raise DropError(
            f"llama-cpp-python {llama_cpp.__version__} cannot be given an importance matrix; "
            f"install a newer one:\n  {INSTALL}"
        )


def binaries() -> list[Path]:
    """The libraries that results depend on; none where llama.cpp is missing."""
    if importlib.util.find_spec("llama_cpp") is None:
        return []
    return [_binary("ggml-base"), _binary("llama")]


def _binary(name: str) -> Path:
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None, "`require` was called"
    assert spec.origin is not None, "a package with an __init__.py"
    folder = Path(spec.origin).parent / "lib"
    found = [p for p in sorted(folder.glob(f"*{name}.*")) if p.suffix in (".so", ".dylib", ".dll")]
    if not found:
        raise DropError(f"{folder} holds no library {name}; install llama.cpp again:\n  {INSTALL}")
    return found[0]
