"""Memory does not grow with depth: twice the blocks, the same peak; less than the model needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tiny import save_tiny

WIDE = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "head_dim": 64}
BLOCK = 4 * (2 * 512 * 512 + 2 * 512 * 128 + 3 * 512 * 1408)  # bytes of weights in float32

SCRIPT = """
    import json, resource, sys, torch
    from pathlib import Path
    from dropbydrop.coding.encoder import Effort
    from dropbydrop.quantization import job as jobs
    from dropbydrop.quantization import pipeline as quantize
    from dropbydrop.system import memory as process

    torch.set_num_threads(1)
    model, out, text, limit = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    jobs.EFFORTS = {"balanced": Effort(1, 0, 0)}
    if limit:  # on top of what the libraries take
        small = model.with_name("1")
        quantize.quantize(
            small, out + "-small", calibration=text, windows=4, seq_len=64, progress=False
        )
        data = next(l for l in open("/proc/self/status") if l.startswith("VmData"))
        now = 1024 * int(data.split()[1])
        resource.setrlimit(resource.RLIMIT_DATA, (now + limit, now + limit))
    quantize.quantize(model, out, calibration=text, windows=4, seq_len=64, progress=False)
    refused = False
    if limit:
        try:
            torch.ones(int(sys.argv[5]), dtype=torch.uint8)
        except RuntimeError:
            refused = True
    print(json.dumps({"peak": process.peak_memory(), "refused": refused}))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("depth")
    for blocks in (1, 4, 8, 16):
        save_tiny(
            root / str(blocks), "llama", num_hidden_layers=blocks, max_shard_size="20MB", **WIDE
        )
    (root / "text.txt").write_text(" ".join(str(i * 7919 % 1000) for i in range(3000)))
    return root


def run(place: Path, blocks: int, limit: int = 0, *more: object) -> dict[str, int]:
    out = place / f"out{blocks}-{limit}"
    arguments = [place / str(blocks), out, place / "text.txt", limit, *more]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=1800,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_twice_the_blocks_the_same_peak(place: Path) -> None:
    four, eight = run(place, 4), run(place, 8)
    assert 0.07 * four["peak"] < 4 * BLOCK, "kept blocks would not show in the peak"
    assert eight["peak"] < 1.05 * four["peak"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits of Linux")
def test_a_model_larger_than_the_memory(place: Path) -> None:
    """Under a limit, kept by the kernel, of three quarters of the weights in float32.

    The limit counts mapped files too, so the model is in several, as large ones are.
    """
    assert run(place, 16, 12 * BLOCK, 16 * BLOCK)["refused"] == 1
