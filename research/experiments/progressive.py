"""Time to the first token while a checkpoint arrives, against waiting for all of it.

    python research/experiments/progressive.py OUT [--mb-per-s 10] [--picture PATH]

A local HTTP server hands out OUT at a fixed rate. `dropbydrop pull` (another process) fetches it;
this process calls `load(dest, bits=<lowest>, upgrade=True)` as soon as the manifest is there,
answers with one token, and answers again at every level as it becomes available. The comparison, in
the same way and at the same rate, fetches everything first, then loads the highest level and
answers. Times count from the start of the pull; the imports of this process are done before it.
The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import http.server
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import dropbydrop
from dropbydrop.checkpoint import Checkpoint
from dropbydrop.system.console import quiet_transformers
from dropbydrop_research.study.style import new_figure, save, series, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CHUNK = 1 << 16


class Link:
    """Serves a folder at `rate` bytes a second, shared by all connections."""

    def __init__(self, folder: Path, rate: float) -> None:
        self.sent = 0
        self.trace: list[tuple[float, int]] = []  # seconds and bytes of every piece
        self.start = time.perf_counter()
        self._next, self._lock = self.start, threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                """Nothing."""

            def do_GET(self) -> None:
                path = folder / self.path.rpartition("/")[2]
                if not path.is_file():
                    return self.send_error(404)
                self.send_response(200)
                self.send_header("Content-Length", str(path.stat().st_size))
                self.end_headers()
                with open(path, "rb") as file:
                    while piece := file.read(_CHUNK):
                        outer.wait(len(piece), rate)
                        self.wfile.write(piece)
                return None

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def wait(self, size: int, rate: float) -> None:
        """Until the next piece may be sent."""
        with self._lock:
            self._next = max(self._next, time.perf_counter()) + size / rate
            pause = self._next - time.perf_counter()
            self.sent += size
            self.trace.append(self.now())
        time.sleep(max(0.0, pause))

    def now(self) -> tuple[float, int]:
        """Seconds and bytes since the start."""
        return time.perf_counter() - self.start, self.sent


def first_token(model: Any) -> int:
    """One greedy token."""
    with quiet_transformers(), torch.inference_mode():
        ids = model.generate(torch.tensor([[1, 2, 3, 4]]), do_sample=False, max_new_tokens=1,
                             pad_token_id=0)  # fmt: skip
    return int(ids[0, -1])


def pulling(url: str, dest: Path, bits: int) -> subprocess.Popen[bytes]:
    """A pull in a process of its own, as users run it."""
    command = [sys.executable, "-m", "dropbydrop", "pull", url, str(dest), "--bits", str(bits)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def progressive(
    out: Path, dest: Path, rate: float, levels: tuple[int, ...]
) -> tuple[list[dict], list[tuple[float, int]]]:
    """First token of every level, while one pull runs; and when bytes arrived."""
    link = Link(out, rate)
    fetching = pulling(link.url, dest, levels[-1])
    while not (dest / "config.json").exists():
        time.sleep(0.005)
    rows = []
    with quiet_transformers():
        model = dropbydrop.load(dest, bits=levels[0], upgrade=True, dtype=torch.float32)
    handle = dropbydrop.upgrade(model)
    for level in levels:
        if not handle.wait(level, 600):
            raise SystemExit(f"level {level} did not arrive")
        token = first_token(model if level == levels[0] else dropbydrop.view(model, level))
        seconds, sent = link.now()
        rows.append({"bits": level, "seconds": seconds, "bytes": sent, "token": token})
    fetching.wait()
    link.http.shutdown()
    return rows, link.trace


def all_first(out: Path, dest: Path, rate: float, level: int) -> dict:
    """Fetch everything, then load and answer."""
    link = Link(out, rate)
    if pulling(link.url, dest, level).wait():
        raise SystemExit("the pull failed")
    with quiet_transformers():
        model = dropbydrop.load(dest, bits=level, dtype=torch.float32)
    token = first_token(model)
    seconds, sent = link.now()
    link.http.shutdown()
    return {"bits": level, "seconds": seconds, "bytes": sent, "token": token}


@styled
def plot(rows: list[dict], trace: list[tuple[float, int]], whole: dict, rate: float) -> Figure:
    """First tokens on the line of arriving bytes."""
    figure, axes = new_figure(1, 1, 5.2, 3.4)
    axis = axes[0, 0]
    end = (max(whole["seconds"], rows[-1]["seconds"]), trace[-1][1])
    arrived = [(0.0, 0), (trace[0][0], 0), *trace, end]
    axis.plot([t for t, _ in arrived], [n / 1e6 for _, n in arrived],
              label=f"bytes arrived, {rate:g} MB/s", **series(5, marker=""))  # fmt: skip
    for i, row in enumerate(rows):
        axis.plot([row["seconds"]], [row["bytes"] / 1e6], label=f"first token, {row['bits']} bits",
                  **series(i, linestyle="", markersize=8))  # fmt: skip
    axis.plot([whole["seconds"]], [whole["bytes"] / 1e6], label="first token, everything first",
              **series(6, linestyle="", markersize=9))  # fmt: skip
    axis.set(xlabel="seconds since the pull began", ylabel="MB arrived", xlim=(0, None))
    axis.legend(loc="lower right")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--mb-per-s", type=float, default=10.0)
    parser.add_argument("--picture", type=Path, help="stem of a PNG and an SVG")
    args = parser.parse_args()
    levels, rate = Checkpoint.open(args.out).levels, args.mb_per_s * 1e6
    with quiet_transformers():
        first_token(dropbydrop.load(args.out, bits=levels[0], dtype=torch.float32))  # imports
    with tempfile.TemporaryDirectory() as folder:
        rows, trace = progressive(args.out, Path(folder) / "a", rate, levels)
        whole = all_first(args.out, Path(folder) / "b", rate, levels[-1])
    if rows[-1]["token"] != whole["token"]:
        raise SystemExit("the upgraded model answers otherwise than the one loaded at once")
    for row in rows:
        print(f"{row['bits']} bits: first token after {row['seconds']:.1f} s, "
              f"{row['bytes'] / 1e6:.1f} MB arrived")  # fmt: skip
    print(f"everything first, {whole['bits']} bits: {whole['seconds']:.1f} s, "
          f"{whole['bytes'] / 1e6:.1f} MB")  # fmt: skip
    if args.picture:
        save(plot(rows, trace, whole, args.mb_per_s), args.picture)
    print(json.dumps({"benchmark": "progressive", "checkpoint": args.out.name,
                      "mb_per_s": args.mb_per_s, "levels": rows, "all_first": whole}))  # fmt: skip


if __name__ == "__main__":
    main()
