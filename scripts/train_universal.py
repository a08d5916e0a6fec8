"""Train the universal codebook sets that ship with the package.

    python scripts/train_universal.py [LEVELS ...]      e.g. 2,3,4 3,4,5

Writes src/dropbydrop/universal_sets/<levels>.safetensors and prints the distortion of each prefix
on fresh N(0, 1) samples beside the Shannon bound 2^(-2 bits). Deterministic for a given machine.
"""

import sys
from pathlib import Path

from safetensors.torch import save_file

from dropbydrop.universal import default_lambdas, distortions, name_of, train

SETS = ([2, 3, 4], [3, 4, 5], [1, 2, 3, 4], [1], [2], [3], [4])
FOLDER = Path(__file__).resolve().parents[1] / "src" / "dropbydrop" / "universal_sets"


def main() -> None:
    chosen = [[int(p) for p in arg.split(",")] for arg in sys.argv[1:]] or SETS
    FOLDER.mkdir(exist_ok=True)
    for levels in chosen:
        lambdas = default_lambdas(levels)
        codebooks = train(levels, lambdas, samples=1 << 18, rounds=40, beam=16)
        save_file(
            {"codebooks": codebooks.half()},
            FOLDER / f"{name_of(levels)}.safetensors",
            metadata={"levels": ",".join(map(str, levels)), "format": "pt"},
        )
        row = " ".join(f"{d:.5f}" for d in distortions(codebooks, levels, lambdas))
        bound = " ".join(f"{4.0**-p:.5f}" for p in range(1, levels[-1] + 1))
        print(f"levels {levels}: D = {row}   bound {bound}", flush=True)


if __name__ == "__main__":
    main()
