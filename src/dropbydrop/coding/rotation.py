"""Input-side rotation of an input group: scale its inputs, then spread outliers over all of them.

An input group (matrices that share one input x) is coded in rotated coordinates, x' = Q x and
W' = W Q^-1, so W' x' = W x. Q is applied online to the activations; it is never merged into norms,
embeddings or the residual stream.

    d_in = 2^k * odd,  Q = (O_odd (x) H_{2^k} / sqrt(2^k)) diag(signs)

`signs` are +-1, and Q is orthogonal; or +-t_i with an input scale t_i > 0 for each input
(channel_scaling.py chooses it). The noise of a code is white in rotated coordinates,
so in W it is proportional to t_i; that is noise shaping which costs nothing at run time and is the
same at every level. Everything that decodes uses Q^T (W = W' Q, gradients of x), the inverse of an
unscaled Q only.

Steps of `apply`: multiply by the signs, view as [odd, 2^k], Walsh-Hadamard along the last
dimension (Sylvester order, normalised), multiply by the orthogonal O_odd along the first. This is
full mixing: one outlier input reaches every rotated coordinate. Without O_odd consecutive blocks of
2^k inputs stay apart, which only experiments do. Stored: a byte an input, sign and scale
(`pack_input_scales`), and one O_odd per odd factor of the whole model.

The Hadamard product runs as one or two small dense products (at most 64 wide each), which a BLAS
does faster than a butterfly of elementwise steps in torch.

Source: randomised Hadamard transforms for incoherence as in QuIP# (Tseng et al. 2024); the odd
factor's Kronecker product as in QuaRot (Ashkboos et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from dropbydrop.system.errors import FormatError


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


def random_signs(d_in: int, seed: int) -> Tensor:
    """Float32 ±1 [d_in]."""
    generator = torch.Generator().manual_seed(seed)
    return 1.0 - 2.0 * torch.randint(0, 2, (d_in,), generator=generator).to(torch.float32)


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

    d_in: int
    block: int  # 2^k, size of the Hadamard factor
    signs: Tensor  # float32 [d_in], ±1 or, with input scales, ±scale
    odd: Tensor | None  # float32 [odd, odd]; None for odd = 1

    @staticmethod
    def make(d_in: int, seed: int = 0) -> Rotation:
        """Draw a rotation for `d_in` inputs, without input scales."""
        power, odd = split_odd(d_in)
        return Rotation(d_in, power, random_signs(d_in, seed), odd_factor(odd) if odd > 1 else None)

    @staticmethod
    def from_stored(d_in: int, packed: Tensor, odd: Tensor | None) -> Rotation:
        """Rebuild a rotation from what a checkpoint stores of it.

        Args:
            packed: uint8 [d_in], of `packed`.
            odd: float32 [odd, odd], not read for odd = 1.

        Raises:
            FormatError: tensors that do not fit `d_in`.
        """
        power, size = split_odd(d_in)
        if size > 1 and (odd is None or tuple(odd.shape) != (size, size)):
            raise FormatError(
                f"full rotation of {d_in} inputs needs the factor rotations.odd{size} "
                f"[{size}, {size}]; found {None if odd is None else tuple(odd.shape)}."
            )
        signs = unpack_input_scales(packed, d_in)
        return Rotation(d_in, power, signs, odd if size > 1 else None)

    @property
    def full(self) -> bool:
        """Whether it mixes all inputs, as every rotation of a checkpoint does."""
        return split_odd(self.d_in) == (self.block, 1 if self.odd is None else len(self.odd))

    def packed(self) -> Tensor:
        """The signs as stored, uint8 [d_in] on the CPU."""
        return pack_input_scales(self.signs.cpu())

    def scale(self, input_scales: Tensor) -> Rotation:
        """This rotation after multiplying each input by its scale, rounded to what can be stored.

        Args:
            input_scales: [d_in], above 0.

        Raises:
            ValueError: a rotation that has scales; scales that are not finite or not above 0.
        """
        if bool((self.signs.abs() != 1).any()):
            raise ValueError("this rotation has input scales already")
        signs = self.signs.sign() * round_input_scales(input_scales).to(self.signs)
        return replace(self, signs=signs)

    def to(self, device: torch.device | str) -> Rotation:
        """The same rotation with its tensors on `device`."""
        return replace(
            self,
            signs=self.signs.to(device),
            odd=None if self.odd is None else self.odd.to(device),
        )

    def apply(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> Q x, same shape and dtype.

        16-bit types round signs with scales too, so that whatever must agree with the codes rotates
        in float32 or better.
        """
        return self._mix(x * self.signs.to(x))

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
        y = x
        if self.odd is not None:
            odd = self.odd.to(x)
            y = y.reshape(*x.shape[:-1], odd.shape[0], self.block)  # [..., odd, 2^k]
            y = (odd.T @ y).reshape(x.shape)  # [..., d_in]
        return mix_hadamard(y, self.block) * self.signs.to(x)

    def apply_weight(self, weight: Tensor) -> Tensor:
        """W [d_out, d_in] -> W Q^-1; without input scales the same map as on activations."""
        return self._mix(weight / self.signs.to(weight))

    def apply_gram(self, gram: Tensor) -> Tensor:
        """H = E[x x^T] [d_in, d_in] -> Q H Q^T."""
        half = self.apply(gram)
        return self.apply(half.T.contiguous()).T
