"""Several processes on one run, over gloo on the CPU: the same bytes as one, and refusals."""

import hashlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dropbydrop.coding.search import backends
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.quantization.pipeline import quantize
from dropbydrop.system.accelerator import pick_device
from dropbydrop.system.distributed import SHARDS, Partition, Ranks, assign_by_cost
from dropbydrop.system.errors import DropError
from tiny import save_tiny

OPTIONS = {"bits": (2, 3, 4), "preset": "fast", "windows": 3, "seq_len": 16, "progress": False}
COMMAND = ["--bits", "2,3,4", "--preset", "fast", "--windows", "3", "--seq-len", "16"]


CHILD = """
import inspect, sys
from dropbydrop.cli import main as cli
from dropbydrop.models import block_runner as walk
from dropbydrop.quantization import encode_blocks as run
from dropbydrop.system.errors import DropError

opened = walk.BlockRunner.open.__func__
names = list(inspect.signature(opened).parameters)[-len(opened.__defaults__):]
opened.__defaults__ = tuple(  # one window a batch: shards to share
    16 if name == "batch_tokens" else value for name, value in zip(names, opened.__defaults__)
)
for option in [a for a in sys.argv if a.startswith("--fail-at=")]:
    sys.argv.remove(option)
    rank, block = map(int, option.removeprefix("--fail-at=").split(","))
    encode_block, encode_groups = run.BlockEncoder.encode_block, run.BlockEncoder._encode_groups

    def at_block(self, i, *rest):
        self.at = i
        encode_block(self, i, *rest)

    def failing(self, *rest):
        if (self.ranks.rank, self.at) == (rank, block):
            raise DropError("the cat sat on the keyboard.")
        return encode_groups(self, *rest)

    run.BlockEncoder.encode_block, run.BlockEncoder._encode_groups = at_block, failing
cli.main()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, a text for calibration, and the checkpoint that one process makes."""
    folder = tmp_path_factory.mktemp("team")
    save_tiny(folder / "model", "llama")
    (folder / "text.txt").write_text("the sea and the old mill by the river in the morning " * 60)
    (folder / "child.py").write_text(CHILD)
    (done,) = start(folder, "one", 1)
    assert done.returncode == 0, done.stderr
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(folder: Path, out: str, size: int, *extra: str) -> list[subprocess.CompletedProcess]:
    """Run the command in `size` processes as torchrun would; waits for all."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([p for p in sys.path if p]),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(size),
    }
    argv = [sys.executable, str(folder / "child.py"), "quantize", str(folder / "model")]
    argv += [str(folder / out), *COMMAND, "--calibration", str(folder / "text.txt")]
    argv += ["--device", "cpu", *extra]
    children = [
        subprocess.Popen(
            argv,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    done = []
    for child in children:
        stdout, stderr = child.communicate(timeout=900)
        done.append(subprocess.CompletedProcess(argv, child.returncode, stdout, stderr))
    return done


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.slow
class TestTwoProcesses:
    def test_the_same_bytes_as_one(self, place):
        first, second = start(place, "two", 2)
        assert first.returncode == second.returncode == 0, first.stderr + second.stderr
        assert files(place / "two") == files(place / "one")
        assert "bits" in first.stdout
        assert second.stdout == ""

    def test_a_run_goes_on_with_another_number_of_them(self, place):
        """Rank 1 fails at the last block; one process finishes, from the kept blocks."""
        first, second = start(place, "torn", 2, "--resume", "--fail-at=1,2")
        assert first.returncode == second.returncode == 2
        assert "rank 1 failed: the cat sat" in first.stderr
        assert "go on" in first.stderr
        assert "error of rank 1: the cat sat" in second.stderr
        assert not (place / "torn").exists()
        (done,) = start(place, "torn", 1, "--resume", "--json")
        assert done.returncode == 0, done.stderr
        assert '"resumed_blocks": 2' in done.stdout
        assert files(place / "torn") == files(place / "one")

    def test_two_go_on_where_one_failed(self, place):
        (first,) = start(place, "torn-one", 1, "--resume", "--fail-at=0,1")
        assert first.returncode == 2
        first, second = start(place, "torn-one", 2, "--resume")
        assert first.returncode == second.returncode == 0, first.stderr + second.stderr
        assert files(place / "torn-one") == files(place / "one")

    def test_trellis_planes_and_weights_of_tokens_are_shared_and_resumed(self, place):
        code = "--code", "trellis", "--preset", "balanced"  # which weighs tokens by gradients
        (done,) = start(place, "trellis", 1, *code)
        assert done.returncode == 0, done.stderr
        first, second = start(place, "trellis-two", 2, *code, "--resume", "--fail-at=1,1")
        assert first.returncode == second.returncode == 2
        first, second = start(place, "trellis-two", 2, *code, "--resume")
        assert first.returncode == second.returncode == 0, first.stderr + second.stderr
        assert files(place / "trellis-two") == files(place / "trellis")

    def test_failures_leave_nothing(self, place):
        results = start(place, "gone", 2, "--fail-at=1,0")
        assert [r.returncode for r in results] == [2, 2]
        assert not list(place.glob(".gone*"))
        assert not (place / "gone").exists()

    def test_bad_input_is_told_once(self, place):
        first, second = start(place, "never", 2, "--preset", "slow")
        assert first.returncode == second.returncode == 2
        assert "preset 'slow'" in first.stderr
        assert second.stderr.count("preset") == 0


class TestShares:
    def runner_shards(self, windows: int, batch: int) -> list[list[slice]]:
        runner = BlockRunner.__new__(BlockRunner)
        runner.batch_tokens = batch * 10
        return runner.shards(windows, 10)

    @pytest.mark.parametrize(("windows", "batch"), [(64, 4), (1, 4), (13, 2), (9, 1), (128, 128)])
    def test_shards_are_the_batches_in_order(self, windows, batch):
        shards = self.runner_shards(windows, batch)
        assert 1 <= len(shards) <= SHARDS
        parts = [part for shard in shards for part in shard]
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(windows))
        assert all(shards)

    @pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
    def test_every_window_has_one_rank(self, size):
        shards = self.runner_shards(29, 2)
        shares = [Ranks(rank, size).partition(shards) for rank in range(size)]
        spans = [partition.windows(rank) for rank, partition in enumerate(shares)]
        assert [i for span in spans for i in range(span.start, span.stop)] == list(range(29))
        for rank, partition in enumerate(shares):
            own = [part for shard in partition.shards for part in shard]
            assert own[0].start == 0
            assert own[-1].stop == spans[rank].stop - spans[rank].start
            assert partition.count == 29

    def test_more_ranks_than_shards_are_refused(self):
        with pytest.raises(DropError, match=r"only 2 batches.*--windows"):
            Ranks(0, 3).partition(self.runner_shards(2, 1))

    def test_shards_are_added_in_their_order(self):
        gen = torch.Generator().manual_seed(0)
        parts = [torch.randn(4, 4, generator=gen) * 10.0**i for i in range(3)]
        partition = Partition(Ranks(), ([slice(0, 1)],), (0,))
        assert torch.equal(partition.total(parts[:1]), parts[0])

    def test_work_is_dealt_evenly(self):
        costs = [9.0, 1.0, 1.0, 5.0, 5.0, 3.0]
        owners = assign_by_cost(costs, 2)
        loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in (0, 1)]
        assert loads == [12.0, 12.0]
        assert assign_by_cost(costs, 1) == [0] * 6
        assert owners == assign_by_cost(list(costs), 2)

    def test_too_many_processes_are_refused(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", str(SHARDS + 1))
        with pytest.raises(DropError, match="Start fewer"), Ranks.join("cpu"):
            pass

    def test_devices(self, monkeypatch):
        assert pick_device("cpu") == "cpu"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert pick_device("auto") == "cpu"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert pick_device("auto") == pick_device("cuda") == "cuda:1"
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(DropError, match=r"CUDA device 2, but 2 were found.*--nproc-per-node"):
            pick_device("cuda")
        with pytest.raises(DropError, match="choose auto"):
            pick_device("gpu7")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        with pytest.raises(DropError, match="finds no CUDA device"):
            pick_device("cuda")


def test_the_search_of_devices_gives_the_errors_of_the_native_one(tmp_path):
    """The pipeline as it runs on a GPU, with the CPU standing in: the same up to ties."""
    if backends()[0] == "torch":
        pytest.skip("no native search to compare with")
    save_tiny(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text("the old mill stands by the river near the sea " * 60)
    errors = [
        quantize(
            tmp_path / "model",
            tmp_path / backend,
            calibration=tmp_path / "text.txt",
            device="cpu",
            backend=backend,
            **OPTIONS,
        ).errors
        for backend in ("torch", backends()[0])
    ]
    for level in (2, 3, 4):
        assert abs(errors[0][level] / errors[1][level] - 1) < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
def test_a_gpu_gives_the_results_of_the_cpu(place):
    """The whole pipeline on the device: errors agree within ties, and nothing stays on the CPU."""
    text = place / "text.txt"
    reports = [
        quantize(
            place / "model", place / f"on-{device}", calibration=text, device=device, **OPTIONS
        )
        for device in ("cpu", "cuda")
    ]
    for level, error in reports[0].errors.items():
        assert abs(reports[1].errors[level] / error - 1) < 0.02
    assert reports[1].device_gib > 0 == reports[0].device_gib
