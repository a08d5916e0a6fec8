"""Train the universal codebook sets that ship with the package.

    python scripts/train_universal.py [LEVELS ...]      e.g. 2,3,4 3,4,5

Writes src/dropbydrop/coding/universal_sets/<levels>.safetensors and prints the distortion of each
prefix on fresh N(0, 1) samples beside the Shannon bound 2^(-2 bits). Deterministic for a given
machine, build and number of threads; elsewhere sums are rounded differently, and the sets are as
good but not the same. The weights of the levels and the distortions stand in the file's metadata.
"""

import json
import sys
import time
from pathlib import Path

from safetensors.torch import save_file

from dropbydrop.coding.codebooks import default_lambdas, distortions, name_of, train

SETS = ([2, 3, 4], [3, 4, 5], [1, 2, 3, 4], [2], [3], [4], [1, 2, 3, 4, 5, 6, 7, 8])
EFFORT = {"samples": 1 << 18, "rounds": 40, "beam": 16}
FOLDER = Path(__file__).resolve().parents[1] / "src" / "dropbydrop" / "coding" / "universal_sets"


def main() -> None:
    chosen = [[int(p) for p in arg.split(",")] for arg in sys.argv[1:]] or SETS
    FOLDER.mkdir(exist_ok=True)
    for levels in chosen:
        start = time.perf_counter()
        lambdas = default_lambdas(levels)
        codebooks = train(levels, lambdas, **EFFORT)
        found = distortions(codebooks, levels, lambdas)
        metadata = {"levels": levels, "lambdas": lambdas, "distortions": found, **EFFORT}
        path = FOLDER / f"{name_of(levels)}.safetensors"
        save_file(
            {"codebooks": codebooks.half()},
            path,
            metadata={"format": "pt", **{k: json.dumps(v) for k, v in metadata.items()}},
        )
        row = " ".join(f"{d:.5f}" for d in found)
        bound = " ".join(f"{4.0**-p:.5f}" for p in range(1, levels[-1] + 1))
        print(
            f"levels {levels}: D = {row}   bound {bound}   {time.perf_counter() - start:.0f} s, "
            f"{path.stat().st_size:,} bytes",
            flush=True,
        )


if __name__ == "__main__":
    main()
