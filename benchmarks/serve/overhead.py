"""What the server adds to a token: one streamed request against the bare decode loop of `bench`.

    python benchmarks/random_model.py OUT --size smollm2
    python benchmarks/serve/overhead.py OUT [--bits 2] [--tokens 64] [--rounds 7]

Both run in this process on the same view, in turn, so that a busy machine slows them alike; the
client is curl, a process of its own. A ratio of 1.05 means 5 % more time for a token.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import threading
from statistics import median

from dropbydrop.evaluation.bench import decode_seconds
from dropbydrop.serve.server import Server
from dropbydrop.serve.service import Service

PROMPT = 16


def streamed_seconds(address: str, model: str, tokens: int) -> float:
    """Seconds of a token, from the first one to the last, as the server tells them."""
    body = {
        "model": model, "prompt": list(range(1, PROMPT + 1)), "max_tokens": tokens, "stream": True,
        "temperature": 0, "ignore_eos": True,
    }  # fmt: skip
    command = ["curl", "-sN", f"{address}/v1/completions", "-H", "content-type: application/json"]
    done = subprocess.run([*command, "-d", json.dumps(body)], capture_output=True, check=True)
    last = done.stdout.decode().split("\n\n")[-3]
    timings = json.loads(last.removeprefix("data: "))["timings"]
    return float(timings["predicted_per_token_ms"]) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="checkpoint folder")
    parser.add_argument("--bits", type=int, default=2, help="level")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a round")
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds")
    given = parser.parse_args()
    service = Service(given.out, [given.bits], None, 4)
    service.engine.precisions.warm_up()
    addresses: list[str] = []
    listening = threading.Event()
    server = Server(
        service, "127.0.0.1", 0, None, lambda at: (addresses.append(at), listening.set())[0]
    )
    thread = threading.Thread(target=server.answer)
    thread.start()
    listening.wait()
    name, bare, served = f"{service.served.name}:{given.bits}bit", [], []
    for _ in range(given.rounds):
        bare.append(decode_seconds(service.engine.precisions.base, PROMPT, given.tokens))
        served.append(streamed_seconds(addresses[0], name, given.tokens))
    server.should_exit = True
    thread.join()
    ratios = [after / before for before, after in zip(bare, served, strict=True)]
    result = {
        "bare_ms": 1e3 * min(bare),
        "served_ms": 1e3 * min(served),
        "ratio_of_best": min(served) / min(bare),
        "ratios": {"least": min(ratios), "median": median(ratios), "most": max(ratios)},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
