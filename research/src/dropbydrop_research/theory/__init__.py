"""The theory of Drop-by-Drop as small pure functions of matrices.

    water_filling   rate-distortion function of Gaussian weights under a weighted MSE
    refinement      Theorem 1: the weighted MSE is a plain MSE, and its optimum nests
    gaussian        how Gaussian a matrix is, in units that matter to a quantizer
    vector_loss     what a vector quantizer of finite dimension must lose on a Gaussian

Conventions of the whole package: W [d_out, d_in], X [d_in, n] (samples are columns here, as in
the paper), H = X X^T [d_in, d_in] or a multiple of it, rates in bits a weight, distortions in the
unit of tr(E H E^T). Everything is computed in float64 on the CPU; nothing here reads files.
"""

from .gaussian import GaussianFit, MassiveActivations, fit_gaussian, massive_activations
from .refinement import (
    Case,
    Level,
    classify,
    components,
    ideal_reconstructions,
    output_distortion,
    recover,
    recover_components,
    refine,
    weighted_distortion,
)
from .vector_loss import E8_SECOND_MOMENT, fixed_rate_loss
from .water_filling import (
    Filling,
    Gap,
    GaussianSource,
    cross_spectrum,
    eigenbasis,
    matched_spectrum,
    row_variances,
    spectrum,
)

__all__ = [
    "E8_SECOND_MOMENT",
    "Case",
    "Filling",
    "Gap",
    "GaussianFit",
    "GaussianSource",
    "Level",
    "MassiveActivations",
    "classify",
    "components",
    "cross_spectrum",
    "eigenbasis",
    "fit_gaussian",
    "fixed_rate_loss",
    "ideal_reconstructions",
    "massive_activations",
    "matched_spectrum",
    "output_distortion",
    "recover",
    "recover_components",
    "refine",
    "row_variances",
    "spectrum",
    "weighted_distortion",
]
