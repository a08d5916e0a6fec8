"""Theory, studies, baselines and comparisons of Drop-by-Drop; see research/README.md."""
