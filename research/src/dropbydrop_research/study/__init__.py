"""Studies behind `dropbydrop study …`: the paper's claims, measured on a model.

    gaussian     how Gaussian the weights are, before and after rotation (Figures 3, 9)
    bound        how far each matrix is from its rate-distortion bound
    refinement   Theorem 1 as an experiment (Figures 4, 10, 11, 12)
    paper        one HTML page of all figures
    data         weights and cached Gram matrices that the studies read
    style        how plots look

Each study is a function `run(...) -> dict` of plain JSON values, and plot functions that take such
a dict, so that a figure can be drawn again from its JSON.
"""
