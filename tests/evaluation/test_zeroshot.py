"""Zero-shot tasks: local files against the harness run directly, and doing it wrong."""

import bz2
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

import dropbydrop
from dropbydrop.checkpoint.files import is_checkpoint
from dropbydrop.cli import main as cli
from dropbydrop.cli.evaluate import load_plain
from dropbydrop.coding.encoder import Effort
from dropbydrop.evaluation.task_files import TASKS, read_items
from dropbydrop.evaluation.zeroshot import _difference, parse_tasks, run
from dropbydrop.models.sources import load_tokenizer
from dropbydrop.quantization import job as jobs
from dropbydrop.quantization import pipeline as quantize
from dropbydrop.system.errors import DropError
from tiny import save_tiny

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed"
)
WORDS = ["river", "mill", "sea", "ship", "harbour", "text", "model", "small", "old", "reads"]


def phrase(seed: int, n: int) -> str:
    g = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=g))


def hub_rows() -> dict[str, list[dict]]:
    """Items with the fields of the hub's data sets."""
    every = range(6)
    arc = [
        {
            "question": f"What {phrase(i, 3)}?",
            "choices": {
                "text": [phrase(10 * i + j, 2) for j in range(3 + i % 3)],
                "label": list("ABCDE"[: 3 + i % 3]),
            },
            "answerKey": "ABC"[i % 3],
        }
        for i in every
    ]
    return {
        "winogrande": [
            {
                "sentence": f"The {phrase(i, 2)} so _ was {phrase(i + 50, 2)}.",
                "option1": WORDS[i],
                "option2": WORDS[i + 3],
                "answer": str(1 + i % 2),
            }
            for i in every
        ],
        "piqa": [
            {"goal": phrase(i, 3), "sol1": phrase(i + 9, 3), "sol2": phrase(i + 99, 3),
             "label": i % 2}
            for i in every
        ],
        "hellaswag": [
            {
                "activity_label": WORDS[i],
                "ctx_a": f"A {phrase(i, 4)}." if i % 2 else f"[header] {phrase(i, 4)} [title] A.",
                "ctx_b": f"the {WORDS[i]}" if i % 2 else "",
                "endings": [phrase(100 * i + j, 3) for j in range(4)],
                "label": str(i % 4),
            }
            for i in every
        ],
        "arc_easy": arc,
        "arc_challenge": arc[::-1],
    }  # fmt: skip


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def local_files(root: Path) -> Path:
    """The same items as people have them on disk."""
    rows = hub_rows()
    for task in rows:
        (root / task).mkdir(parents=True)
    (root / "winogrande/dev.jsonl").write_text(lines(rows["winogrande"]))
    bare = [{k: v for k, v in row.items() if k != "label"} for row in rows["piqa"]]
    (root / "piqa/valid.jsonl").write_text(lines(bare))
    labels = "".join(f"{row['label']}\n" for row in rows["piqa"])
    (root / "piqa/valid-labels.lst").write_text(labels)
    (root / "hellaswag/hellaswag_val.jsonl").write_text(lines(rows["hellaswag"]))
    gold = [
        {
            "question": row["question"],
            "choices": row["choices"]["text"],
            "gold": row["choices"]["label"].index(row["answerKey"]),
        }
        for row in rows["arc_easy"]
    ]
    (root / "arc_easy/test.jsonl").write_text(lines(gold))
    official = [
        {
            "id": "x",
            "question": {
                "stem": row["question"],
                "choices": [
                    {"text": text, "label": label}
                    for text, label in zip(*row["choices"].values(), strict=True)
                ],
            },
            "answerKey": row["answerKey"],
        }
        for row in rows["arc_challenge"]
    ]
    (root / "arc_challenge/test.jsonl").write_text(lines(official))
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), "llama-tied")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local_files(tmp_path_factory.mktemp("data") / "tasks")


# ---- data -------------------------------------------------------------------------------------


def test_every_local_form_becomes_the_hubs_fields(data: Path) -> None:
    for task, rows in hub_rows().items():
        items = read_items(data, task)
        assert items.rows == rows
        assert len(items.sha256) == 64


def test_the_text_form_of_hellaswag(tmp_path: Path) -> None:
    """What the harness makes of it: the last, unfinished clause capitalised, WikiHow untouched."""
    (tmp_path / "hellaswag").mkdir()
    text = (
        "Roof: A man sits on a roof. he\n3\nis.\nrips.\nholds.\nstarts.\n"
        "How: Check it. See e.g. the shop. It is: fine.\n0\na\nb\nc\nd\n"
    )
    path = tmp_path / "hellaswag/hellaswag_val_full.txt.bz2"
    path.write_bytes(bz2.compress(text.encode()))
    roof, how = read_items(tmp_path, "hellaswag").rows
    assert (roof["ctx_a"], roof["ctx_b"]) == ("A man sits on a roof.", "he")
    assert roof["activity_label"] == "Roof"
    assert roof["endings"] == ["is.", "rips.", "holds.", "starts."]
    assert roof["label"] == "3"
    assert (how["ctx_a"], how["ctx_b"]) == ("Check it. See e.g. the shop. It is: fine.", "")


@pytest.mark.parametrize(
    ("task", "file", "content", "says"),
    [
        ("piqa", "valid.jsonl", '{"goal": "a", "sol1": "b"}\n', "line 1"),
        ("piqa", "valid.jsonl", "\n\n", "no items"),
        ("winogrande", "dev.jsonl", "not json\n", "no item of winogrande"),
        ("winogrande", "dev.jsonl", "[" * 200_000, "no item of winogrande"),
        ("arc_easy", "test.jsonl", '{"question": "a", "choices": ["b"], "gold": 3}\n', "answer"),
        ("hellaswag", "hellaswag_val_full.txt", "a: b\n0\n", "six lines"),
        ("hellaswag", "hellaswag_val_full.txt", "a: b\n7\nc\nd\ne\nf\n", "label 0 to 3"),
        ("hellaswag", "hellaswag_val_full.txt.bz2", "not bz2", "cannot be read"),
        ("boolq", "test.jsonl", "{}\n", "leave --tasks-data"),
    ],
)
def test_damaged_or_unknown_items_are_refused(
    tmp_path: Path, task: str, file: str, content: str, says: str
) -> None:
    (tmp_path / task).mkdir()
    with pytest.raises(DropError, match=r"holds none of|leave --tasks-data"):
        read_items(tmp_path, task)
    (tmp_path / task / file).write_text(content)
    with pytest.raises(DropError, match=says):
        read_items(tmp_path, task)


def test_labels_must_match_the_items(tmp_path: Path) -> None:
    local_files(tmp_path / "d")
    labels = tmp_path / "d/piqa/valid-labels.lst"
    labels.write_text("0\n1\n0\n1\n0\n1\n1\n")
    with pytest.raises(DropError, match="7 labels"):
        read_items(tmp_path / "d", "piqa")
    labels.write_text("0\n2\n")
    with pytest.raises(DropError, match="0 and 1"):
        read_items(tmp_path / "d", "piqa")


def test_names_of_tasks() -> None:
    assert parse_tasks("piqa, arc_easy") == ["piqa", "arc_easy"]
    assert parse_tasks("all") == list(TASKS)
    for bad in ("", "piqa,piqa"):
        with pytest.raises(DropError, match="once"):
            parse_tasks(bad)


def test_paired_differences() -> None:
    """Three items of four agree: the mean and its error by the textbook."""
    ours = [{"doc_id": i, "acc": a} for i, a in enumerate([1.0, 0.0, 1.0, 0.0])]
    base = [{"doc_id": i, "acc": a} for i, a in enumerate([1.0, 0.0, 1.0, 1.0])]
    found = _difference(ours, base)
    assert found["difference"] == pytest.approx(-0.25)
    assert found["difference_stderr"] == pytest.approx((0.75 / 3 / 4) ** 0.5)
    assert _difference(ours[:1], base[:1]) == {"difference": 0.0, "difference_stderr": None}


# ---- the harness ------------------------------------------------------------------------------


@needs_harness
def test_numbers_are_those_of_the_harness_run_directly(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    ours = run(
        {"model": load_plain(model, torch.float32)}, load_tokenizer(model), parse_tasks("all"),
        data=data, limit=5, progress=False,
    )  # fmt: skip
    assert ours["versions"]["lm_eval"] == lm_eval.__version__
    assert ours["data"]["piqa"]["items"] == 6

    hub = {
        ("allenai/winogrande", "winogrande_xl"): ("winogrande", "validation"),
        ("baber/piqa", None): ("piqa", "validation"),
        ("Rowan/hellaswag", None): ("hellaswag", "validation"),
        ("allenai/ai2_arc", "ARC-Easy"): ("arc_easy", "test"),
        ("allenai/ai2_arc", "ARC-Challenge"): ("arc_challenge", "test"),
    }

    load = datasets.load_dataset

    def from_hub(path: str, name: str | None = None, **kwargs: object) -> datasets.DatasetDict:
        task, split = hub[path, name]
        file = tmp_path / f"{task}.jsonl"
        file.write_text(lines(hub_rows()[task]))
        splits = {s: str(file) for s in ("train", "validation", split)}
        return load("json", data_files=splits, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    root = Path(lm_eval.__file__).parent / "tasks"  # indexing all tasks takes ten seconds
    folders = [str(root / name) for name in ("arc", "hellaswag", "piqa", "winogrande")]
    direct = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={model},dtype=float32",
        device="cpu",
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=folders, include_defaults=False),
        limit=5,
    )
    compared = 0
    for task, row in ours["models"]["model"]["tasks"].items():
        assert row["items"] == 5
        for metric in ("acc", "acc_norm"):
            if f"{metric},none" in direct["results"][task]:
                assert row[metric] == direct["results"][task][f"{metric},none"]
                stderr = direct["results"][task][f"{metric}_stderr,none"]
                assert row[f"{metric}_stderr"] == pytest.approx(stderr, rel=1e-12)
                compared += 1
    assert compared == 9
    assert ours["versions"]["tasks"] == direct["versions"]


@needs_harness
def test_models_are_told_apart_and_compared_by_item(model: Path, data: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(model)
    one = AutoModelForCausalLM.from_pretrained(model).eval()
    other = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():  # the same network, its predictions turned round
        other.model.norm.weight.neg_()
    models = {"2": other, "reference": one, "3": one}
    found = run(models, tokenizer, ["piqa", "arc_easy"], data=data, progress=False)
    json.dumps(found, allow_nan=False)
    assert list(found["models"]) == ["2", "reference", "3"]
    same, flipped = found["models"]["3"]["tasks"], found["models"]["2"]["tasks"]
    for task in ("piqa", "arc_easy"):
        assert same[task]["difference"] == same[task]["difference_stderr"] == 0
        gap = flipped[task]["acc"] - same[task]["acc"]
        assert flipped[task]["difference"] == pytest.approx(gap)
        assert "difference" not in found["models"]["reference"]["tasks"][task]
    accs = [row["acc"] for row in same.values()]
    assert found["models"]["3"]["mean"]["acc"] == pytest.approx(sum(accs) / 2)
    assert any(row["difference_stderr"] > 0 for row in flipped.values())


@needs_harness
def test_levels_of_a_checkpoint_beside_the_original(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command; and the harness, which ties weights, leaves the shared storage as it is."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(i * 7919 % 1000) for i in range(3000)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "EFFORTS", dict.fromkeys(jobs.EFFORTS, Effort(4, 1, 1)))
        sizes = {"windows": 4, "seq_len": 64, "progress": False}
        quantize.quantize(model, tmp_path / "out", [2, 4], calibration=text, **sizes)
    out, argv = tmp_path / "out", ["--tasks", "piqa,winogrande", "--tasks-data", str(data)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["dropbydrop", "eval", str(out), *argv, "--reference", str(model),
                                   "--limit", "4", "--json"])  # fmt: skip
        cli.main()
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])["tasks"]
    assert list(result["models"]) == ["reference", "2", "4"]
    assert result["models"]["4"]["true_bits"] > result["models"]["2"]["true_bits"] > 2
    for row in result["models"]["4"]["tasks"].values():
        assert row["items"] == 4
        assert {"acc", "acc_stderr", "difference", "difference_stderr"} <= set(row)
    assert "4 bits" in captured.err
    assert "±" in captured.err
    top, ids = dropbydrop.load(out, dtype=torch.float32), torch.arange(5, 25)[None]
    low = dropbydrop.view(top, 2)
    with torch.no_grad():
        before = low(ids).logits, top(ids).logits
        run({"2": low}, load_tokenizer(model), ["piqa"], data=data, limit=2, progress=False)
        assert torch.equal(low(ids).logits, before[0])
        assert torch.equal(top(ids).logits, before[1])


@needs_harness
@pytest.mark.slow  # looking for an unknown name, the harness indexes all it has: ten seconds
def test_unknown_tasks_and_limits(model: Path, data: Path) -> None:
    tokenizer = load_tokenizer(model)
    with pytest.raises(DropError, match="1 item or more"):
        run({}, tokenizer, ["piqa"], data=data, limit=0)
    with pytest.raises(DropError, match="no task piqua; the usual five"):
        run({}, tokenizer, ["piqua"], data=data)


@needs_harness
def test_no_network_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DropError, match=r"no route\)\. Without a network"):
        run({}, load_tokenizer(model), ["piqa"])


def test_missing_harness_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DropError, match=r"dropbydrop\[tasks\]"):
        run({}, None, ["piqa"])


def test_eval_wants_something_to_do(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["dropbydrop", "eval", str(model)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "--text" in capsys.readouterr().err
    assert not is_checkpoint(model)
    monkeypatch.setattr("sys.argv", ["x", "eval", str(model), "--tasks", "piqa", "--bits", "2"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "no levels" in capsys.readouterr().err


@pytest.mark.skipif("DROPBYDROP_DATA" not in os.environ, reason="DROPBYDROP_DATA is not set")
def test_the_real_files() -> None:
    """Sizes of the splits as published."""
    sizes = {
        "winogrande": 1267,
        "piqa": 1838,
        "hellaswag": 10042,
        "arc_easy": 2376,
        "arc_challenge": 1172,
    }
    root = Path(os.environ["DROPBYDROP_DATA"])
    if not all((root / task).is_dir() for task in sizes):
        pytest.skip("DROPBYDROP_DATA holds no tasks")
    assert {task: len(read_items(root, task).rows) for task in sizes} == sizes
