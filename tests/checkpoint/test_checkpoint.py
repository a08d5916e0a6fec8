"""Writing and reading a checkpoint folder: all or nothing, and every kind of damage is named."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dropbydrop.checkpoint import Checkpoint, CheckpointWriter, StoredGroup
from dropbydrop.checkpoint.pull import pull
from dropbydrop.checkpoint.tensor_files import METADATA
from dropbydrop.coding.codebook_set import BytesSet
from dropbydrop.coding.planes import BytesPlane
from dropbydrop.coding.rotation import Rotation
from dropbydrop.system import atomic_folder as folder_module
from dropbydrop.system.errors import DropError, FormatError, MissingPlaneError, PrecisionError
from random_model import group_rotation, llama_groups, random_planes, random_set
from tiny import COUNTS, sign, tiny_llama, write_checkpoint


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, code: str) -> Path:
    """A checkpoint that no test changes."""
    return write_checkpoint(tmp_path_factory.mktemp("pristine") / "out", code=code)


@pytest.fixture
def out(pristine: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "out"))


def leftovers(parent: Path) -> list[str]:
    return [p.name for p in parent.iterdir() if p.name.startswith(".")]


# ---------------------------------------------------------------------------------- writing


def test_reads_back_what_was_written(pristine: Path, code: str) -> None:
    checkpoint = Checkpoint.open(pristine)
    generator = torch.Generator().manual_seed(0)
    model = tiny_llama()
    for index, (_, modules) in enumerate(llama_groups(model)):
        d_in = model.get_submodule(modules[0]).in_features
        turn = group_rotation(index, d_in, scaled_inputs=True)
        stored = checkpoint.read_rotation(index)
        x = torch.randn(3, d_in)
        assert torch.equal(stored.apply(x), turn.apply(x))
        for module in modules:
            d_out = model.get_submodule(module).out_features
            for m in range(1, COUNTS[code][4] + 1):
                rows = d_out * (2 if m == 1 else 1) // 8  # of a stream
                shape = (d_out, d_in // 8) if code == "bytes" else (rows, d_in)
                codes = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
                assert torch.equal(checkpoint.read_codes(module, m), codes)
            scales = 0.4 * (1 + torch.rand(d_out, generator=generator)) / d_in**0.5
            assert torch.equal(checkpoint.read(f"{module}.scales"), scales.half())
    assert torch.equal(checkpoint.read("model.norm.weight"), model.model.norm.weight)
    assert checkpoint.levels == (2, 3, 4)
    assert checkpoint.planes_present() == tuple(range(1, COUNTS[code][4] + 1))
    assert checkpoint.verify() == []


def test_writing_twice_gives_the_same_bytes(pristine: Path, tmp_path: Path, code: str) -> None:
    again = write_checkpoint(tmp_path / "again", code=code)
    names = sorted(path.name for path in pristine.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    for name in names:
        assert (pristine / name).read_bytes() == (again / name).read_bytes(), name


def test_file_modes_follow_the_umask(tmp_path: Path) -> None:
    for umask, mode, folder_mode in ((0o022, 0o644, 0o755), (0o027, 0o640, 0o750)):
        private = tmp_path / f"private{umask}"
        private.write_text("x")
        private.chmod(0o600)  # modes of the source must not travel
        before = os.umask(umask)
        try:
            out = write_checkpoint(tmp_path / f"out{umask}", extra_files={"LICENSE": private})
        finally:
            os.umask(before)
        assert out.stat().st_mode & 0o777 == folder_mode
        for path in out.iterdir():
            assert path.stat().st_mode & 0o777 == mode, path.name


def test_large_planes_are_sharded(pristine: Path, tmp_path: Path, code: str) -> None:
    out = write_checkpoint(tmp_path / "out", code=code, shard_bytes=3000)
    checkpoint = Checkpoint.open(out)
    planes = COUNTS[code][4]
    for m in range(1, planes + 1):
        paths = checkpoint.plane_paths(m)
        assert len(paths) > 2
        assert paths[0].name == f"plane-{m}-00001-of-{len(paths):05d}.safetensors"
        together: dict[str, torch.Tensor] = {}
        for path in paths:
            shard = load_file(path)
            assert sum(t.numel() for t in shard.values()) <= 3000
            together |= shard
        whole = load_file(pristine / f"plane-{m}.safetensors")
        assert list(whole) == list(together)
        assert all(torch.equal(whole[name], together[name]) for name in whole)
    assert checkpoint.verify() == []
    module = checkpoint.quantization.modules[-1]
    expected = Checkpoint.open(pristine).read_codes(module, 3)
    assert torch.equal(checkpoint.read_codes(module, 3), expected)
    checkpoint.plane_paths(3)[1].unlink()
    assert Checkpoint.open(out).planes_present() == (1, 2, 4)[: planes - 1]
    with pytest.raises(MissingPlaneError, match="plane-3-00002-of-"):
        Checkpoint.open(out).require(4)


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    out = write_checkpoint(tmp_path / "out", shard_bytes=1)
    assert len(Checkpoint.open(out).plane_paths(1)) == 14  # 7 matrices in each of 2 blocks
    assert Checkpoint.open(out).verify() == []


def test_spills_to_disk_while_adding(tmp_path: Path) -> None:
    """Nothing but names and shapes stays in memory: the bytes are in the hidden folder."""
    ck = CheckpointWriter(tmp_path / "o")
    for i in range(50):
        codes = [torch.zeros(1000, 100, dtype=torch.uint8)] * 2
        ck.add_linear(f"m{i}", codes, torch.ones(1000), d_in=800)
    spilled = sum(p.stat().st_size for p in (tmp_path / ".o.partial").rglob("*"))
    assert spilled > 0.9 * 50 * 2 * 100_000  # all but the last buffer
    ck.abort()
    assert leftovers(tmp_path) == []


def test_a_block_that_forgets_to_finish(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not finished"), CheckpointWriter(tmp_path / "o"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["first", "middle", "manifest"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, error: type[BaseException]
) -> None:
    files = {"first": "plane-1.safetensors", "middle": "model.safetensors"}
    _fail_in_write(monkeypatch, files.get(moment, "manifest.json"), error())
    with pytest.raises(error):
        write_checkpoint(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("name", ["plane-2.safetensors", "config.json"])
def test_full_disk_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    _fail_in_write(monkeypatch, name, OSError(number, os.strerror(number)))
    with pytest.raises(DropError, match=r"the disk is full: .*out could not be written"):
        write_checkpoint(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_for_real(tmp_path: Path) -> None:
    """The kernel refuses: a limit on file sizes stands for the full disk (EFBIG for ENOSPC)."""
    model = tiny_llama()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(DropError, match="the disk is full"):
            write_checkpoint(tmp_path / "out", model, tokenizer=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with CheckpointWriter(tmp_path / "out") as ck:
            ck.add_linear("m", [torch.zeros(64, 8, dtype=torch.uint8)], torch.ones(64), d_in=64)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells make jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(tmp_path.iterdir()) == []


def test_existing_folders(pristine: Path, out: Path, tmp_path: Path) -> None:
    with pytest.raises(DropError, match="exists; choose another name, or ask to overwrite"):
        write_checkpoint(out)
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(DropError, match="not a dropbydrop checkpoint, so it is not overwritten"):
        write_checkpoint(other, overwrite=True)
    assert (other / "thesis.tex").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert Checkpoint.open(write_checkpoint(empty)).verify() == []
    with pytest.raises(DropError, match="is not a folder; create it first"):
        write_checkpoint(tmp_path / "no" / "parent")


def test_overwrite_replaces_only_at_the_end(
    pristine: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (out / "plane-1.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        _fail_in_write(patch, "manifest.json", ValueError())
        with pytest.raises(ValueError):  # noqa: PT011 - ours, without a text
            write_checkpoint(out, overwrite=True, seed=1)
    assert (out / "plane-1.safetensors").read_bytes() == before
    # Where folders cannot be exchanged, a rename that fails puts the old folder back.
    with monkeypatch.context() as patch:
        rename = os.rename

        def failing(source: Path, target: Path) -> None:
            if Path(target) == out and Path(source).name != "old":
                raise PermissionError(errno.EACCES, "no", str(target))
            rename(source, target)

        patch.setattr(folder_module, "exchange", lambda *folders: False)
        patch.setattr(folder_module.os, "rename", failing)
        with pytest.raises(DropError, match="no"):
            write_checkpoint(out, overwrite=True, seed=1)
    assert (out / "plane-1.safetensors").read_bytes() == before
    write_checkpoint(out, overwrite=True, seed=1)
    assert (out / "plane-1.safetensors").read_bytes() != before
    assert Checkpoint.open(out).verify() == []
    assert leftovers(out.parent) == []


def test_out_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    spec = StoredGroup("s", ("m",), 8, "u")
    mine = tmp_path / "o" / "mine.txt"

    def appears() -> None:
        mine.parent.mkdir()
        mine.write_text("kept")

    with pytest.raises(DropError, match="exists"), CheckpointWriter(tmp_path / "o") as ck:
        write_minimal(ck, spec, before_finish=appears)
    assert mine.read_text() == "kept"
    assert leftovers(tmp_path) == []


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    spec, source = StoredGroup("s", ("m",), 8, "u"), write_checkpoint(tmp_path / "source")
    with CheckpointWriter(tmp_path / "o") as ck:
        with pytest.raises(DropError, match="another process is working on"):
            write_checkpoint(tmp_path / "o")
        with pytest.raises(DropError, match="another process is working on"):
            pull(source, tmp_path / "o", progress=False)  # it would go on in the new folder
        write_minimal(ck, spec)
    assert Checkpoint.open(tmp_path / "o").verify() == []
    assert leftovers(tmp_path) == []


def write_minimal(ck: CheckpointWriter, spec: StoredGroup, **changes: Any) -> Path:
    """One linear of [4, 8]; `changes` make it contradictory."""
    from dropbydrop.checkpoint import Embeddings, QuantizationConfig

    ck.add_group(spec, Rotation.make(spec.d_in))
    d_in = changes.get("d_in", spec.d_in)
    module = changes.get("module", "m")
    rows, columns = changes.get("codes", (4, d_in // 8))
    codes = [torch.zeros(rows, columns, dtype=torch.uint8)] * changes.get("planes", 1)
    ck.add_linear(module, codes, torch.ones(4), d_in=d_in)
    books = [torch.ones(*changes.get("book", (128, 8)))] * changes.get("books", 1)
    ck.add_codebook_set(changes.get("set", "u"), BytesSet.of(books))
    ck.add_embedding("e", torch.ones(4, 8), bits=16)
    quantization = QuantizationConfig(
        1, (1,), (BytesPlane(),), (changes.get("described", spec),), Embeddings(16, ("e",), True)
    )
    if "before_finish" in changes:
        changes["before_finish"]()
    return ck.finish(
        changes.get("config", {"model_type": "toy"}),
        quantization,
        changes.get("files"),
        changes.get("parameters", 64),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"module": "n"}, r"linears and input groups differ in \['m', 'n'\]"),
        ({"d_in": 16}, r"m is a matrix \[4, 16\], its input group says"),
        ({"set": "v"}, r"codebooks.u.1 is missing, expected F16 \[128, 8\]"),
        ({"books": 2}, r"codebooks.u.2 is F16 \[128, 8\], expected no such codebook"),
        ({"book": (256, 8)}, r"codebooks.u.1 is F16 \[256, 8\], expected F16 \[128, 8\]"),
        ({"codes": (3, 1)}, r"m.codes.1 is U8 \[3, 1\], its plane says U8 \[4, 1\]"),
        ({"codes": (4, 2)}, r"m.codes.1 is U8 \[4, 2\], its plane says U8 \[4, 1\]"),
        ({"planes": 2}, "2 planes added, the config has 1"),
        (
            {"described": StoredGroup("t", ("m",), 8, "u")},
            "not those of the config",
        ),
        ({"parameters": 3}, "counted 32 quantized"),
        ({"files": {"model.safetensors": b""}}, "cannot be an extra file"),
        ({"files": {"config.json": b""}}, "cannot be an extra file"),
        ({"files": {"pytorch_model.bin": b""}}, "cannot be an extra file"),
        ({"files": {"modeling.py": b""}}, "cannot be an extra file"),
    ],
)
def test_contradictory_input_is_a_bug_of_the_caller(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    spec = StoredGroup("s", ("m",), 8, "u")
    with pytest.raises(ValueError, match=message), CheckpointWriter(tmp_path / "o") as ck:
        write_minimal(ck, spec, **changes)
    assert list(tmp_path.iterdir()) == []


def test_code_in_the_config_is_refused(tmp_path: Path, out: Path) -> None:
    spec = StoredGroup("s", ("m",), 8, "u")
    config = {"auto_map": {"AutoModel": "modeling.Model"}}
    with pytest.raises(FormatError, match="'auto_map'"), CheckpointWriter(tmp_path / "o") as ck:
        write_minimal(ck, spec, config=config)
    edit_json(out / "config.json", lambda data: data.update(config))
    with pytest.raises(FormatError, match="never carry code"):
        Checkpoint.open(out)


def test_bad_tensors(tmp_path: Path) -> None:
    codes = torch.zeros(4, 2, dtype=torch.uint8)
    ck = CheckpointWriter(tmp_path / "o")
    for bad, scales in (
        ([codes.int()], torch.ones(4)),
        ([codes], torch.ones(1, 2, 4)),
        ([codes], torch.full((4,), 1e6)),
        ([codes], torch.full((4,), float("nan"))),
    ):
        with pytest.raises(ValueError, match="x: "):
            ck.add_linear("x", bad, scales, d_in=16)
    ck.add_linear("m", [codes], torch.ones(4), d_in=16)
    with pytest.raises(ValueError, match="2 planes, other matrices 1"):
        ck.add_linear("n", [codes, codes], torch.ones(4), d_in=16)
    with pytest.raises(ValueError, match="added twice"):
        ck.add_linear("m", [codes], torch.ones(4), d_in=16)
    with pytest.raises(ValueError, match="reserved"):
        ck.add_tensor("codebooks.x.1", torch.ones(4))
    for other in (Rotation.make(24), Rotation(16, 1, torch.ones(16), None)):
        with pytest.raises(ValueError, match="rotation does not match"):
            ck.add_group(StoredGroup("s", ("m",), 16), other)
    ck.abort()


# ---------------------------------------------------------------------------------- reading


def test_counts_bytes_and_bits(pristine: Path, code: str) -> None:
    """By hand: q, k, v [64 + 32 + 32, 64], o [64, 64], gate, up [192, 64], down [64, 96], twice."""
    checkpoint = Checkpoint.open(pristine)
    weights = 2 * (128 * 64 + 64 * 64 + 192 * 64 + 64 * 96)
    rows = 2 * (128 + 64 + 192 + 64)
    signs = 2 * (64 + 64 + 64 + 96)  # a byte an input for its sign and scale
    for bits in (2, 3, 4):
        count = COUNTS[code][bits]
        books = count * (128 * 8 * 2 if code == "bytes" else 64 + 4 + 12)
        total = bits * weights // 8 + 2 * rows + books + signs + 3 * 3 * 4
        assert checkpoint.true_bits(bits) == pytest.approx(8 * total / weights, rel=1e-12)
        sizes = [(pristine / f"plane-{m}.safetensors").stat().st_size for m in range(1, count + 1)]
        read = sum(sizes) + (pristine / "model.safetensors").stat().st_size
        assert checkpoint.bytes_at(bits) == read
        parameters = sum(p.numel() for p in tiny_llama().parameters())
        assert checkpoint.true_bits_whole(bits) == pytest.approx(8 * read / parameters)
    assert checkpoint.manifest.quantized_parameters == weights
    with pytest.raises(PrecisionError, match="it has 2, 3, 4"):
        checkpoint.true_bits(1)


def test_absent_planes_matter_only_when_asked_for(out: Path, code: str) -> None:
    here = COUNTS[code][2]
    for m in range(here + 1, COUNTS[code][4] + 1):
        (out / f"plane-{m}.safetensors").unlink()
    checkpoint = Checkpoint.open(out)
    assert checkpoint.planes_present() == tuple(range(1, here + 1))
    assert checkpoint.require(2) == 2
    checkpoint.require_planes(here)
    assert checkpoint.verify() == []
    assert checkpoint.true_bits(4) > checkpoint.true_bits(3)  # known without the planes
    module, m = checkpoint.quantization.modules[0], here + 1
    message = rf"plane {m} is needed, but .*plane-{m}.* is missing \(complete planes .*: .*{here}\)"
    with pytest.raises(MissingPlaneError, match=message):
        checkpoint.require(3)
    with pytest.raises(MissingPlaneError, match=message):
        checkpoint.require_planes(m)
    with pytest.raises(MissingPlaneError, match=message):
        checkpoint.read_codes(module, m)
    with pytest.raises(KeyError):
        checkpoint.read_codes(module, 5)
    with pytest.raises(KeyError):
        checkpoint.read_codes("nobody", 1)


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def other_codebook(plane: dict[str, Any]) -> None:
    """A valid plane of the same kind and bits with a codebook of another size."""
    plane.update({"window": 13} if plane["kind"] == "trellis" else {"sign_symmetric": False})


def flip_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 0x10
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def swap_planes(out: Path) -> None:
    """2 and 3, which are of one size in both kinds."""
    (out / "plane-2.safetensors").rename(out / "aside")
    (out / "plane-3.safetensors").rename(out / "plane-2.safetensors")
    (out / "aside").rename(out / "plane-3.safetensors")


def test_truncated_plane(out: Path) -> None:
    truncate(out / "plane-2.safetensors")
    checkpoint = Checkpoint.open(out)
    with pytest.raises(FormatError, match=r"plane-2.safetensors has \d+ bytes, the manifest says"):
        checkpoint.require(3)
    assert [(f.file, f.kind) for f in checkpoint.verify()] == [("plane-2.safetensors", "size")]


def test_swapped_planes_are_found_without_hashing(out: Path) -> None:
    swap_planes(out)
    checkpoint = Checkpoint.open(out)
    with pytest.raises(FormatError, match=r"plane-2.safetensors does not hold plane 2 .*exchanged"):
        checkpoint.require(4)
    with pytest.raises(FormatError, match="does not hold plane 2"):
        checkpoint.read_codes(checkpoint.quantization.modules[0], 2)
    assert {f.kind for f in checkpoint.verify(hashes=False)} == {"header"}
    assert {f.kind for f in checkpoint.verify()} >= {"hash"}


def test_plane_of_another_checkpoint_is_found_by_its_hash(
    out: Path, tmp_path: Path, code: str
) -> None:
    other = write_checkpoint(tmp_path / "other", code=code, seed=1)
    shutil.copy(other / "plane-2.safetensors", out / "plane-2.safetensors")
    checkpoint = Checkpoint.open(out)
    assert checkpoint.verify(hashes=False) == []
    assert [(f.file, f.kind) for f in checkpoint.verify()] == [("plane-2.safetensors", "hash")]


@pytest.mark.parametrize("name", ["plane-3.safetensors", "model.safetensors", "tokenizer.json"])
def test_flipped_bit(out: Path, name: str) -> None:
    flip_bit(out / name)
    findings = Checkpoint.open(out, verify=False).verify()
    assert [(f.file, f.kind) for f in findings] == [(name, "hash")]
    assert "SHA-256" in str(findings[0])


def test_flipped_bit_in_a_header(out: Path) -> None:
    path = out / "plane-1.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"U8"', b'"I8"', 1))
    with pytest.raises(FormatError, match=r"is I8 \[\d+, \d+\], expected U8"):
        Checkpoint.open(out).require(2)


def test_wrong_dtype_and_extra_tensor(out: Path) -> None:
    """Rewritten by other software, with the manifest adapted: only the headers tell."""
    path = out / "plane-1.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "surprise": torch.zeros(1)}, path, METADATA)
    sign(out, path.name)
    with pytest.raises(FormatError, match=r"surprise is F32 \[1\], expected no such tensor"):
        Checkpoint.open(out).require(2)


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "model.safetensors"])
def test_missing_or_truncated_file(out: Path, name: str) -> None:
    kept = (out / name).read_bytes()
    (out / name).unlink()
    with pytest.raises(FormatError, match=f"{name} (does not exist|is missing)"):
        Checkpoint.open(out)
    (out / name).write_bytes(kept[: len(kept) // 2])
    with pytest.raises(FormatError, match=f"{name} (cannot be read as JSON|has .* bytes)"):
        Checkpoint.open(out)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", lambda d: d["quantization_config"].update(format_version=3), "version 3"),
        (
            "config.json",
            lambda d: d["quantization_config"]["input_groups"][1].update(d_in=128),
            r"input_groups.1.input_scales is U8 \[64\], expected U8 \[128\]",
        ),
        (
            "config.json",
            lambda d: d["quantization_config"]["input_groups"].pop(),
            "'input_groups.7.input_scales' is not described",
        ),
        (
            "config.json",
            lambda d: d["quantization_config"]["planes"][1].update(kind="hexagons"),
            "plane of kind 'hexagons'",
        ),
        ("manifest.json", lambda d: d.update(format_version=2), "format_version 2"),
        ("config.json", lambda d: d.pop("quantization_config"), "not a dropbydrop checkpoint"),
        (
            "config.json",
            lambda d: d["quantization_config"]["planes"].pop(),
            r"contradict planes of \[[12], 1(, 1)?\] bits",
        ),
        ("manifest.json", lambda d: d["planes"].pop(), r"lists [23] planes, the config [34]"),
        (
            "config.json",
            lambda d: d["quantization_config"]["input_groups"][0].update(codebooks="learned"),
            "codebooks.learned.1 is missing",
        ),
        (
            "config.json",
            lambda d: other_codebook(d["quantization_config"]["planes"][1]),
            r"codebooks.universal.2(.taps)? is (F16 \[128|U8 \[12).*, expected (F16 \[256|U8 \[13)",
        ),
        (
            "config.json",
            lambda d: d["quantization_config"]["input_groups"][0].update(rotation={"kind": "none"}),
            "rotation 'none' is unknown to this version",
        ),
        (
            "config.json",
            lambda d: d["quantization_config"]["input_groups"][0]["modules"].append("model.norm"),
            "model.norm.scales is missing",
        ),
        (
            "config.json",
            lambda d: d["quantization_config"]["embeddings"].update(modules=["lm_head"]),
            "lm_head.rows is missing",
        ),
    ],
)
def test_contradictions_between_files(
    out: Path, name: str, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    edit_json(out / name, change)
    if name != "manifest.json":
        sign(out, name)
    with pytest.raises(FormatError, match=message):
        Checkpoint.open(out)


@pytest.mark.parametrize(
    ("code", "part", "value", "message"),
    [
        ("bytes", "", float("nan"), "1 has values that are not finite"),
        ("trellis", "", 64, "1 has values beyond 63"),
        ("trellis", "", -128, "1 has values beyond 63"),
        ("trellis", ".taps", 64, "1.taps has labels of more than 64 values"),
        ("trellis", ".scale", float("nan"), "1.scale has values that are not finite"),
        ("trellis", ".scale", -1.0, "1.scale is not above 0"),
    ],
)
def test_values_that_no_codebook_holds(
    tmp_path: Path, code: str, part: str, value: float, message: str
) -> None:
    """They are found when the folder is opened, with sizes and headers as they were."""
    out = write_checkpoint(tmp_path / "out", code=code)
    path = out / "model.safetensors"
    tensors = load_file(path)
    tensors[f"codebooks.universal.1{part}"].view(-1)[-1] = value
    save_file(tensors, path, METADATA)
    sign(out, path.name)
    with pytest.raises(FormatError, match=f"codebook set 'universal' is damaged: {message}"):
        Checkpoint.open(out)


def test_a_writer_refuses_them_too(tmp_path: Path) -> None:
    books = random_set(random_planes("trellis", (2,)))
    books.parts[0][""][7] = -100
    writer = CheckpointWriter(tmp_path / "out")
    with pytest.raises(ValueError, match="codebook set u: 1 has values beyond 63"):
        writer.add_codebook_set("u", books)
    large = BytesSet.of([torch.full((128, 8), 1e6)])
    with pytest.raises(ValueError, match=r"codebooks.u.1: values that are not finite"):
        writer.add_codebook_set("u", large)
    writer.abort()


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is not a folder"):
        Checkpoint.open(tmp_path / "nothing")
    with pytest.raises(FormatError, match=r"config.json does not exist"):
        Checkpoint.open(tmp_path)
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="dropbydrop quantize MODEL OUT"):
        Checkpoint.open(tmp_path)


# ---------------------------------------------------------------------------------- helpers


def _fail_in_write(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    """Raise in the middle of writing the file `name`."""
    write = folder_module.AtomicFolder.write

    def failing(self: Any, file: str, chunks: Any) -> None:
        def some() -> Any:
            for i, chunk in enumerate(chunks):
                if i == 0:
                    yield chunk[: len(chunk) // 2]
                    raise error

        write(self, file, some() if file == name else chunks)

    monkeypatch.setattr(folder_module.AtomicFolder, "write", failing)


def test_no_reader_is_needed_to_find_a_plane(pristine: Path) -> None:
    """Names on disk are those of docs/format.md; any safetensors reader gets at them."""
    with safe_open(pristine / "plane-2.safetensors", framework="pt") as file:
        assert "model.layers.1.mlp.down_proj.codes.2" in file.keys()  # noqa: SIM118
        assert file.metadata() == METADATA
