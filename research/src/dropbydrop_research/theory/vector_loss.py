"""What a vector quantizer of finite dimension loses on a Gaussian source.

At high rate a fixed-rate quantizer of dimension k reaches (Zador 1982; Gersho and Gray, Vector
Quantization and Signal Compression, chapter 10)

    D = G_k * ||f||_{k/(k+2)} * 2^(-2R),    ||f||_{k/(k+2)} = 2 pi sigma^2 ((k + 2) / k)^((k+2)/2)

for a white Gaussian density f, with G_k the normalised second moment of the best cell. Against the
rate-distortion function sigma^2 2^(-2R) that is a constant factor, the loss below: 2.72 (4.35 dB,
Panter and Dite) for scalars, 1.37 (1.38 dB) for k = 8 with cells as good as those of E8.
No free codebook of that dimension does better at high rate; sums of small codebooks do worse.
"""

import math

E8_SECOND_MOMENT = 929 / 12960
"""G of the lattice E8 (Conway and Sloane, Sphere Packings, Lattices and Groups, chapter 21)."""


def fixed_rate_loss(dimension: int, second_moment: float) -> float:
    """High-rate distortion of a fixed-rate quantizer over D(R) of a white Gaussian (a ratio).

    Args:
        dimension: k >= 1.
        second_moment: G_k, dimensionless; 1/12 for intervals, `E8_SECOND_MOMENT` for k = 8.
    """
    if dimension < 1 or not second_moment > 0:
        raise ValueError(f"dimension {dimension} and second moment {second_moment}")
    k = dimension
    return second_moment * 2 * math.pi * ((k + 2) / k) ** ((k + 2) / 2)
