"""Decoding a token natively: all blocks of a Llama-like model in one call.

    step = DecodeStep(decoder, group_of)      # group_of([q, k, v]) -> their `CpuGroup`
    states = step(embedded, [Place(position, caches)])

With every product at memory speed, half of a token's time on a 135M model is spent between the
products: 211 calls from Python and some 300 small torch operators a token, compiled or not. This
replaces them by one native call (native/kernels/step.cpp) for up to 16 tokens, of one sequence or
of several, at one precision or each at its own: planes are added up, so tokens at P planes take
part in the first P of a product, and a plane is read once for all that need it. A token's result is
the same bit for bit in any company. It computes what the blocks
compute, in float32 between the products; q/k/v share one rotation and one set of tables, as do gate
and up. runtime/fused_decode.py lets a model use it.

What is supported is what the blocks actually are, checked on construction: RMS norms, rotary
positions in the halves convention, grouped-query attention without windows or sinks, a gated SiLU
feed-forward part, optional biases on q/k/v, optional norms of query and key heads. That covers
Llama, Mistral without window, SmolLM, Qwen2 and Qwen3. `UnsupportedModelError` names what differs.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dropbydrop.system.errors import UnsupportedModelError
from dropbydrop.system.native_library import members

from .. import registry
from ..prepared_group import PreparedGroup
from ..registry import TYPES
from . import ops
from .cpu_group import CpuGroup

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # config.model_type
_SILU = ("SiLU", "SiLUActivation")
_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
_MAGIC = 0x7265646F63656464  # DROP_DECODER_MAGIC
_MIXED = -2  # drop_step: decoders of different codes


GroupOf = Callable[[Sequence[nn.Module]], PreparedGroup]
Caches = list[tuple[Tensor, Tensor]]  # of a sequence: keys and values of each block


class Place(NamedTuple):
    """Where a token stands.

    Attributes:
        position: in its sequence; written there.
        caches: of the sequence, each tensor [1, kv_heads, capacity, head_dim], contiguous. Tokens
            of one sequence follow each other and name the same object.
        step: that of the token's own precision, None for the one that is called.
    """

    position: int
    caches: Caches
    step: DecodeStep | None = None


class MixedCodesError(ValueError):
    """Tokens of one call whose precisions are no prefixes of the same codes."""


class _Block(ctypes.Structure):
    _fields_ = (
        *members(ctypes.c_void_p, "input_norm", "post_norm", "q_norm", "k_norm"),
        *members(ops.GroupStruct, "qkv", "output", "gate_up", "down"),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        *members(ctypes.c_int64, "magic", "hidden", "heads", "kv_heads", "head_dim"),
        *members(ctypes.c_int64, "intermediate", "positions"),
        *members(ctypes.c_double, "eps", "attention_scale"),
        *members(ctypes.c_void_p, "final_norm", "cosines", "sines", "blocks"),
        ("count", ctypes.c_int64),
    )


class _Place(ctypes.Structure):
    _fields_ = (
        *members(ctypes.c_int64, "position", "capacity"),
        *members(ctypes.c_void_p, "caches", "decoder"),
    )


class _Tokens(ctypes.Structure):
    _fields_ = (
        *members(ctypes.c_void_p, "x", "out"),
        *members(ctypes.c_int64, "n", "cache_type"),
        ("places", ctypes.c_void_p),
    )


def _refuse(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the native decode step does not cover {what}; the model runs through torch instead."
    )


class DecodeStep:
    """The native decode step of one view of a model. Any number of threads may call it.

    Holds references to the decoder's parts, not to the decoder; copies only norms, and only those
    that are not float32.
    """

    def __init__(self, inner: Any, group_of: GroupOf, kernel: str | None = None) -> None:
        """Describe the blocks of a decoder.

        Args:
            inner: a decoder of transformers (`LlamaModel`) on the CPU.
            group_of: gives the `CpuGroup` of quantized linears that read one input, or raises
                UnsupportedModelError.
            kernel: a name to force; see `registry.select`.

        Raises:
            UnsupportedModelError: the blocks compute something else than described above.
            KernelError: a kernel named that is not available.
        """
        self.kernel = registry.select(kernel)
        if not self.kernel.native:
            raise _refuse(f"the kernel {self.kernel.name!r}")
        config = inner.config
        self._keep: list[object] = []
        self._growing = threading.Lock()
        _check(config, inner)
        if inner.norm.weight.numel() != config.hidden_size:
            raise _refuse("a final norm of another size than the states")
        first = inner.layers[0].self_attn
        self.rotary = inner.rotary_emb
        self.head_dim = first.head_dim
        self.kv_heads = config.num_key_value_heads
        self.blocks = (_Block * len(inner.layers))()
        for i, layer in enumerate(inner.layers):
            self.blocks[i] = self._block(layer, group_of, config.hidden_size)
        self.hidden = config.hidden_size
        groups = (g for b in self.blocks for g in (b.qkv, b.output, b.gate_up, b.down))
        self.planes = sum(group.prefix for group in groups)  # that a token reads
        self._decoder = _Decoder(
            _MAGIC,
            self.hidden,
            config.num_attention_heads,
            self.kv_heads,
            self.head_dim,
            config.intermediate_size,
            0,
            config.rms_norm_eps,
            first.scaling,
            self._floats(inner.norm.weight),
            None,
            None,
            ctypes.addressof(self.blocks),
            len(self.blocks),
        )

    def _floats(self, tensor: Tensor | None) -> int | None:
        """Address of a float32 copy (the tensor itself if it is one); None stays None."""
        if tensor is None:
            return None
        values = tensor.detach().float().contiguous()
        self._keep.append(values)
        return values.data_ptr()

    def _group(self, group: PreparedGroup) -> ops.GroupStruct:
        """The C structure of an input group, which is kept alive."""
        job = group.job if isinstance(group, CpuGroup) else None
        if job is None:
            raise _refuse("matrices that are not packed for the native kernels")
        self._keep.append(group)
        return ops.GroupStruct.from_buffer_copy(
            ctypes.string_at(job.address, ctypes.sizeof(ops.GroupStruct))
        )

    def _block(self, layer: Any, group_of: GroupOf, hidden: int) -> _Block:
        attention, mlp = layer.self_attn, layer.mlp
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        sizes = [(layer.input_layernorm, hidden), (layer.post_attention_layernorm, hidden)]
        sizes += [(norm, attention.head_dim) for norm in (q_norm, k_norm) if norm is not None]
        if any(norm.weight.numel() != size for norm, size in sizes):
            raise _refuse("norms of other sizes than the states")
        return _Block(
            self._floats(layer.input_layernorm.weight),
            self._floats(layer.post_attention_layernorm.weight),
            self._floats(None if q_norm is None else q_norm.weight),
            self._floats(None if k_norm is None else k_norm.weight),
            self._group(group_of([attention.q_proj, attention.k_proj, attention.v_proj])),
            self._group(group_of([attention.o_proj])),
            self._group(group_of([mlp.gate_proj, mlp.up_proj])),
            self._group(group_of([mlp.down_proj])),
        )

    def _positions(self, count: int) -> None:
        """Make sure the rotary tables reach `count` positions; grown to the next power of two."""
        if count <= self._decoder.positions:
            return
        with self._growing:
            if count <= self._decoder.positions:
                return
            size = max(1024, 1 << (count - 1).bit_length())
            cosines, sines = self.rotary(torch.zeros(1), torch.arange(size)[None])
            # A call that is under way may read either table: both begin alike, both stay alive.
            self._decoder.cosines = self._floats(cosines[0])
            self._decoder.sines = self._floats(sines[0])
            self._decoder.positions = size

    def __call__(self, embedded: Tensor, places: Sequence[Place]) -> Tensor:
        """Run n tokens through all blocks and the final norm.

        Args:
            embedded: [n, hidden], n at most MAX_GEMV_ROWS.
            places: of each token; all caches are of one type.

        Returns:
            float32 [n, hidden].

        Raises:
            MixedCodesError: steps that are no precisions of the same codes; nothing was written.
        """
        n = embedded.shape[0]
        x = embedded.detach().float().contiguous()
        out = torch.empty(n, self.hidden)
        addresses = {
            id(caches): (ctypes.c_void_p * (2 * len(caches)))(
                *[tensor.data_ptr() for pair in caches for tensor in pair]
            )
            for _, caches, _ in places
        }
        described = (_Place * n)(
            *[
                _Place(
                    position,
                    caches[0][0].shape[2],
                    ctypes.addressof(addresses[id(caches)]),
                    None if step is None else ctypes.addressof(step._decoder),
                )
                for position, caches, step in places
            ]
        )
        for step in {place.step or self for place in places}:
            step._positions(1 + max(place.position for place in places))
        tokens = _Tokens(
            x.data_ptr(),
            out.data_ptr(),
            n,
            TYPES[places[0].caches[0][0].dtype],
            ctypes.addressof(described),
        )
        status = ops.native_library().drop_step(
            self.kernel.index,
            ctypes.byref(self._decoder),
            ctypes.byref(tokens),
            torch.get_num_threads(),
        )
        if status == _MIXED:
            raise MixedCodesError(f"{n} tokens at precisions that share no codes")
        if status:
            told = [(place.position, place.capacity) for place in described]
            raise ValueError(f"{n} tokens at positions in caches of (position, capacity) {told}")
        return out


def _check(config: Any, inner: Any) -> None:
    """Raise unless the blocks are of the supported kind."""
    if config.model_type not in MODEL_TYPES:
        raise _refuse(f"models of type {config.model_type!r}")
    if getattr(config, "hidden_act", None) != "silu":
        raise _refuse(f"the activation {getattr(config, 'hidden_act', None)!r}")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if kinds != {"full_attention"} or (window and config.model_type == "mistral"):
        raise _refuse("attention over a sliding window")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ("default", "linear", "llama3", "yarn"):
        raise _refuse(f"rotary positions of type {rope!r}")
    for layer in inner.layers:
        attention = layer.self_attn
        norms = [layer.input_layernorm, layer.post_attention_layernorm, inner.norm]
        norms += [m for m in (getattr(attention, f"{x}_norm", None) for x in "qk") if m is not None]
        for norm in norms:
            if type(norm).__name__ not in _NORMS or norm.variance_epsilon != config.rms_norm_eps:
                raise _refuse(f"norms of type {type(norm).__name__}")
        if type(layer.mlp.act_fn).__name__ not in _SILU:
            raise _refuse(f"the activation {type(layer.mlp.act_fn).__name__}")
        if attention.scaling != inner.layers[0].self_attn.scaling:
            raise _refuse("attention that layers scale differently")
        if attention.head_dim % 8 or attention.head_dim > 256 or config.hidden_size % 8:
            raise _refuse(f"heads of {attention.head_dim}")
        if not getattr(attention, "use_rope", True):
            raise _refuse("blocks without rotary positions")
        if getattr(layer.mlp, "experts", None) is not None:
            raise _refuse("experts")
