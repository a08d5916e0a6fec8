"""Train the universal codebook sets that ship with the package.

    python scripts/train_universal.py [LEVELS ...]                    e.g. 2,3,4 3,4,5
    python scripts/train_universal.py trellis [WINDOW ...]            e.g. 12 14

Writes src/dropbydrop/coding/universal_sets/<levels>.safetensors, or trellis-<levels>-<window>, and
prints the distortion of each prefix on fresh N(0, 1) samples beside the Shannon bound 2^(-2 bits).
Deterministic for a given machine, build and number of threads; elsewhere sums are rounded
differently, and the sets are as good but not the same. The weights of the levels and the
distortions stand in the file's metadata.

The taps of trellis planes are searched here too (coding/trellis/training.py), once for planes of
2, 1, 1, 1 bits and once for 1, 1, 1, 1: levels that need other planes take theirs from these. A
window begins from the taps of the one before it. Takes some ten minutes of one core.
"""

import json
import sys
import time
from pathlib import Path

from safetensors.torch import save_file

from dropbydrop.coding.codebooks import default_lambdas, distortions, name_of, train
from dropbydrop.coding.planes import counts_of, trellis_planes
from dropbydrop.coding.trellis import training as trellis

SETS = ([2, 3, 4], [3, 4, 5], [1, 2, 3, 4], [2], [3], [4], [1, 2, 3, 4, 5, 6, 7, 8])
EFFORT = {"samples": 1 << 18, "rounds": 40, "beam": 16}
TRELLIS_SETS = {(3, 4, 5): ([2, 3, 4], [3, 4, 5]), (1, 2, 3, 4): ([1, 2, 3, 4],)}  # by their taps
TRELLIS_EFFORT = {"sequences": 512, "rounds": 20}
TRIES = {12: 400, 14: 80, 16: 16}  # of taps, by window
FOLDER = Path(__file__).resolve().parents[1] / "src" / "dropbydrop" / "coding" / "universal_sets"


def write(name, tensors, found, bits, start, **metadata) -> None:
    """One set, its metadata in JSON; prints a line about it."""
    path = FOLDER / f"{name}.safetensors"
    metadata = {"distortions": found, **metadata}
    texts = {"format": "pt", **{k: json.dumps(v) for k, v in metadata.items()}}
    save_file(tensors, path, metadata=texts)
    row = " ".join(f"{d:.5f}" for d in found)
    bound = " ".join(f"{4.0**-b:.5f}" for b in bits)
    seconds = time.perf_counter() - start
    size = path.stat().st_size
    print(f"{name}: D = {row}   bound {bound}   {seconds:.0f} s, {size:,} bytes", flush=True)


def train_bytes(levels) -> None:
    """A set of byte planes."""
    start, lambdas = time.perf_counter(), default_lambdas(levels)
    codebooks = train(levels, lambdas, **EFFORT)
    found = distortions(codebooks, levels, lambdas)
    bits = range(1, levels[-1] + 1)
    given = {"levels": levels, "lambdas": lambdas, **EFFORT}
    write(name_of(levels), {"codebooks": codebooks.half()}, found, bits, start, **given)


def train_trellis(windows) -> None:
    """The sets of trellis planes for windows in ascending order."""
    for widest, sets in TRELLIS_SETS.items():
        taps = None
        for window in windows:
            start = time.perf_counter()
            taps = trellis.find_all_taps(widest, window, TRIES[window], shorter=taps)
            for levels in sets:
                lambdas, planes = default_lambdas(levels), trellis_planes(levels, window)
                books = trellis.train(
                    levels, window, lambdas, taps[: len(planes)], **TRELLIS_EFFORT
                )
                found = trellis.distortions(books, counts_of(planes, levels), lambdas)
                sums = [sum(p.bits for p in planes[: m + 1]) for m in range(len(planes))]
                given = {"levels": levels, "lambdas": lambdas, "tries": TRIES[window]}
                name = f"trellis-{name_of(levels)}-{window}"
                write(name, books.named(), found, sums, start, **given, **TRELLIS_EFFORT)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    if sys.argv[1:2] == ["trellis"]:
        train_trellis([int(w) for w in sys.argv[2:]] or list(TRIES))
        return
    for levels in [[int(p) for p in arg.split(",")] for arg in sys.argv[1:]] or SETS:
        train_bytes(levels)


if __name__ == "__main__":
    main()
