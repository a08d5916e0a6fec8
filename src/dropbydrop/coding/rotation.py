"""Input-side rotation of an input group: scale its inputs, then spread outliers over all of them.

An input group (matrices that share one input x) is coded in rotated coordinates, x' = Q x and
W' = W Q^-1, so W' x' = W x. Q is applied online to the activations; it is never merged into norms,
embeddings or the residual stream.

    d_in = 2^k * odd,  Q = (O_odd (x) H_{2^k} / sqrt(2^k)) diag(signs)

`signs` are +-1, and Q is orthogonal; or, in a scaled rotation, +-t_i with an input scale t_i > 0
for each input (channel_scaling.py chooses it). The noise of a code is white in rotated coordinates,
so in W it is proportional to t_i; that is noise shaping which costs nothing at run time and is the
same at every level. Everything that decodes uses Q^T (W = W' Q, gradients of x), the inverse of an
unscaled Q only.

Steps of `apply`: multiply by the signs, view as [odd, 2^k], Walsh-Hadamard along the last
dimension (Sylvester order, normalised), multiply by the orthogonal O_odd along the first. This is
full mixing: one outlier input reaches every rotated coordinate. A block rotation (kind "block")
keeps only the Hadamard over consecutive blocks, for shards that cannot be mixed; "none" is the
identity. Stored: d_in sign bits an input group, or d_in bytes for signs with scales
(`pack_input_scales`), and one O_odd per odd factor of the whole model.

The Hadamard product runs as one or two small dense products (at most 64 wide each), which a BLAS
does faster than a butterfly of elementwise steps in torch.

Source: randomised Hadamard transforms for incoherence as in QuIP# (Tseng et al. 2024); the odd
factor's Kronecker product as in QuaRot (Ashkboos et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dropbydrop.errors import FormatError


def split_odd(d: int) -> tuple[int, int]:
    """d = 2^k * odd -> (2^k, odd)."""
    power = d & -d
    return power, d // power


@lru_cache(maxsize=32)
def hadamard(size: int) -> Tensor:
    """Normalised Sylvester-Hadamard matrix, float32 [size, size], size a power of two."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"Hadamard size {size} is not a power of two")
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=torch.float64)
        two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        while matrix.shape[0] < size:
            matrix = torch.kron(two, matrix)
        normal: Tensor = matrix / float(size) ** 0.5
        return normal.to(torch.float32)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@lru_cache(maxsize=64)
def hadamard_on(size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """`hadamard(size)` [size, size] on a device, copied there once: every input group needs it.

    An ordinary tensor even when first asked for in inference mode, so that training can use it.
    """
    with torch.inference_mode(False):
        return hadamard(size).to(device, dtype)


def mix_hadamard(x: Tensor, size: int) -> Tensor:
    """Walsh-Hadamard over consecutive blocks of `size` along the last dimension.

    x [..., d], `size` dividing d; same shape and dtype.
    """
    shape = x.shape
    low = min(size, 64)
    y: Tensor = x.reshape(-1, low) @ hadamard_on(low, x.device, x.dtype)  # [n * d / low, low]
    if size > low:
        high = size // low
        y = y.view(-1, high, low).transpose(1, 2)  # [n * d / size, low, high]
        y = mix_hadamard(y.reshape(-1, high), high).view(-1, low, high).transpose(1, 2)
    return y.reshape(shape)


@lru_cache(maxsize=32)
def odd_factor(odd: int) -> Tensor:
    """The orthogonal factor for an odd size: float32 [odd, odd], fixed for each size.

    A Haar-like matrix from the QR factorisation of a seeded Gaussian one, in float64, rounded
    once. It is stored in the checkpoint, so a reader never has to reproduce it.
    """
    generator = torch.Generator().manual_seed(odd)
    gauss = torch.randn(odd, odd, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gauss)
    factor: Tensor = (q * r.diagonal().sign()).to(torch.float32)
    return factor.contiguous()


def pack_signs(signs: Tensor) -> Tensor:
    """float ±1 [d_in] -> uint8 [ceil(d_in / 8)], bit i % 8 of byte i // 8 set where sign is -1."""
    bits = (signs < 0).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)  # [bytes, 8]
    weights = (1 << torch.arange(8)).to(torch.uint8)
    return (bits * weights).sum(1).to(torch.uint8)


def unpack_signs(packed: Tensor, d_in: int) -> Tensor:
    """Inverse of `pack_signs`: float32 ±1 [d_in]."""
    if packed.dtype != torch.uint8 or packed.numel() != -(-d_in // 8):
        raise FormatError(
            f"signs of {packed.numel()} x {packed.dtype} for {d_in} inputs; "
            f"expected {-(-d_in // 8)} bytes. The checkpoint is damaged."
        )
    bits = (
        packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    ) & 1  # [bytes, 8]
    return 1.0 - 2.0 * bits.reshape(-1)[:d_in].to(torch.float32)


STEPS = 8  # input scales an octave
_ONE = 64  # exponent of the scale 1; exponents take 7 bits


def round_input_scales(input_scales: Tensor) -> Tensor:
    """Input scales [d_in] to the nearest that can be stored: 2^(e / 8), e = -64 ... 63.

    Raises:
        ValueError: scales that are not finite or not above 0.
    """
    if not bool((torch.isfinite(input_scales) & (input_scales > 0)).all()):
        raise ValueError("input scales must be finite and above 0")
    exponent = (input_scales.double().log2() * STEPS).round().clamp(-_ONE, _ONE - 1)
    return torch.exp2(exponent / STEPS).float()


def pack_input_scales(signs: Tensor) -> Tensor:
    """Signed scales [d_in] -> uint8 [d_in]: bit 7 the sign, the others e + 64 for 2^(e / 8)."""
    exponent = (signs.abs().double().log2() * STEPS).round().to(torch.int64) + _ONE
    if not bool(((exponent >= 0) & (exponent < 2 * _ONE)).all()):
        raise ValueError("input scales beyond 2^-8 ... 2^7.875: round_input_scales first")
    return (exponent + 128 * (signs < 0)).to(torch.uint8)


def unpack_input_scales(packed: Tensor, d_in: int) -> Tensor:
    """Inverse of `pack_input_scales`: float32 [d_in], every byte is valid."""
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (d_in,):
        raise FormatError(
            f"input scales {tuple(packed.shape)} x {packed.dtype} for {d_in} inputs. "
            "The checkpoint is damaged."
        )
    exponent = (packed & 127).to(torch.float64) - _ONE
    return (torch.exp2(exponent / STEPS) * (1.0 - 2.0 * (packed >= 128))).to(torch.float32)


@dataclass(frozen=True, eq=False)
class Rotation:
    """A map Q on the d_in inputs of an input group. Immutable; see the module's note."""

    kind: str  # "full", "block" or "none"
    d_in: int
    block: int  # size of the Hadamard factor (1 for "none")
    signs: Tensor | None  # float32 [d_in], ±1 or, if scaled, ±scale; None for "none"
    odd: Tensor | None  # float32 [odd, odd]; None unless "full" with odd > 1
    scaled: bool = False

    @staticmethod
    def make(d_in: int, kind: str = "full", block: int | None = None, seed: int = 0) -> Rotation:
        """Draw a rotation for `d_in` inputs.

        Raises:
            ValueError: unknown kind, or a block that is not a power of two dividing d_in.
        """
        if kind == "none":
            return Rotation("none", d_in, 1, None, None)
        generator = torch.Generator().manual_seed(seed)
        signs = 1.0 - 2.0 * torch.randint(0, 2, (d_in,), generator=generator).to(torch.float32)
        power, odd = split_odd(d_in)
        if kind == "full":
            return Rotation("full", d_in, power, signs, odd_factor(odd) if odd > 1 else None)
        if kind != "block":
            raise ValueError(f"rotation kind {kind!r}: choose full, block or none")
        size = power if block is None else block
        if size < 1 or size & (size - 1) or d_in % size:
            raise ValueError(f"Hadamard block {size} must be a power of two that divides {d_in}")
        return Rotation("block", d_in, size, signs, None)

    @staticmethod
    def from_stored(
        spec: dict[str, Any], d_in: int, packed_signs: Tensor | None, odd: Tensor | None
    ) -> Rotation:
        """Rebuild a rotation from a checkpoint's input group entry and tensors.

        Args:
            spec: the JSON form, as of `spec()`.
            packed_signs: uint8 [d_in] if scaled, else [ceil(d_in / 8)]; None for kind "none".
            odd: float32 [odd, odd]; None unless "full" with odd > 1.

        Raises:
            FormatError: unknown kind, or tensors that do not fit `d_in`.
        """
        kind = spec.get("kind")
        if kind == "none":
            return Rotation("none", d_in, 1, None, None)
        if kind not in ("full", "block") or packed_signs is None:
            raise FormatError(
                f"rotation {spec!r} is unknown to this version or its signs are missing; "
                "upgrade dropbydrop or fetch the checkpoint again."
            )
        scaled = bool(spec.get("scaled", False))
        signs = (unpack_input_scales if scaled else unpack_signs)(packed_signs, d_in)
        power, size = split_odd(d_in)
        if kind == "block":
            block = int(spec.get("block", 0))
            if block < 1 or block & (block - 1) or d_in % block:
                raise FormatError(f"rotation block {block} does not divide {d_in} inputs.")
            return Rotation("block", d_in, block, signs, None, scaled)
        if size > 1 and (odd is None or tuple(odd.shape) != (size, size)):
            raise FormatError(
                f"full rotation of {d_in} inputs needs the factor rotations.odd{size} "
                f"[{size}, {size}]; found {None if odd is None else tuple(odd.shape)}."
            )
        return Rotation("full", d_in, power, signs, odd if size > 1 else None, scaled)

    def scale(self, input_scales: Tensor) -> Rotation:
        """This rotation after multiplying each input by its scale, rounded to what can be stored.

        Args:
            input_scales: [d_in], above 0.

        Raises:
            ValueError: kind "none", which multiplies by nothing; a rotation that has scales;
                scales that are not finite or not above 0.
        """
        if self.signs is None:
            raise ValueError("a rotation of kind 'none' has no place for input scales")
        if self.scaled:
            raise ValueError("this rotation has input scales already")
        signs = self.signs.sign() * round_input_scales(input_scales).to(self.signs)
        return replace(self, signs=signs, scaled=True)

    def spec(self) -> dict[str, Any]:
        """The JSON form kept in the checkpoint's config."""
        spec: dict[str, Any] = {"kind": self.kind}
        if self.kind == "block":
            spec["block"] = self.block
        if self.scaled:
            spec["scaled"] = True
        return spec

    def packed(self) -> Tensor | None:
        """The signs as stored, uint8 [d_in] if scaled, else [ceil(d_in / 8)]; None for "none"."""
        if self.signs is None:
            return None
        return (pack_input_scales if self.scaled else pack_signs)(self.signs.cpu())

    def to(self, device: torch.device | str) -> Rotation:
        """The same rotation with its tensors on `device`."""
        return replace(
            self,
            signs=None if self.signs is None else self.signs.to(device),
            odd=None if self.odd is None else self.odd.to(device),
        )

    def apply(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> Q x, same shape and dtype.

        16-bit types round signs with scales too, so that whatever must agree with the codes rotates
        in float32 or better.
        """
        return x if self.signs is None else self._mix(x * self.signs.to(x))

    def _mix(self, x: Tensor) -> Tensor:
        """The orthogonal part of Q, without signs and scales: x [..., d_in] -> the same shape."""
        y = mix_hadamard(x, self.block)
        if self.odd is not None:
            odd = self.odd.to(x)
            y = y.reshape(*x.shape[:-1], odd.shape[0], self.block)  # [..., odd, 2^k]
            y = (odd @ y).reshape(x.shape)  # [..., d_in]
        return y

    def transpose(self, x: Tensor) -> Tensor:
        """x' [..., d_in] -> Q^T x', same shape and dtype: rows of W' to rows of W = W' Q."""
        if self.signs is None:
            return x
        y = x
        if self.odd is not None:
            odd = self.odd.to(x)
            y = y.reshape(*x.shape[:-1], odd.shape[0], self.block)  # [..., odd, 2^k]
            y = (odd.T @ y).reshape(x.shape)  # [..., d_in]
        return mix_hadamard(y, self.block) * self.signs.to(x)

    def apply_weight(self, weight: Tensor) -> Tensor:
        """W [d_out, d_in] -> W Q^-1; unscaled, that is the same map as on activations."""
        return weight if self.signs is None else self._mix(weight / self.signs.to(weight))

    def apply_gram(self, gram: Tensor) -> Tensor:
        """H = E[x x^T] [d_in, d_in] -> Q H Q^T."""
        half = self.apply(gram)
        return self.apply(half.T.contiguous()).T

    def matrix(self) -> Tensor:
        """Q itself, float32 [d_in, d_in]."""
        return self.apply(torch.eye(self.d_in)).T.contiguous()
