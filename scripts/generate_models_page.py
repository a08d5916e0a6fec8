"""Write docs/models.md: what becomes of every text-generating model type of transformers.

    python scripts/generate_models_page.py [--check] [TYPE ...]

Every type that transformers lists for causal language models or for images and text is built from
its default config with few layers, on the meta device, and put through the checks that `quantize`
makes before any work. TYPEs limit the work and print their rows. With --check nothing is written
either; the exit status is 1 if rows of docs/models.md are not what would be written. A run on the
newest transformers says what a release has added or broken.
"""

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.pretrained import auto_class, model_from
from dropbydrop.models.structure import refuse_by_name
from dropbydrop.models.weight_files import WeightFiles
from dropbydrop.system.errors import DropError

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
LAYERS = 6  # enough for an expert layer behind the dense ones that some families begin with
START = "| type | class | result |\n|---|---|---|\n"
RUN, FITS = "run", "fits"


class _Names(WeightFiles):
    """Files that hold whatever the model asks for."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.folder, self._file_of = Path("."), dict.fromkeys(model.state_dict(), "")


def small_config(kind: str) -> Any:
    """The default config with few layers, where the type can have few."""
    few = {"num_hidden_layers": LAYERS}
    for settings in (few, {"text_config": few}, {}):
        with contextlib.suppress(Exception):
            config = AutoConfig.for_model(kind, **settings)
            if not settings or config.get_text_config().num_hidden_layers == LAYERS:
                return config
    raise ValueError("its default config is not complete")


def result_of(kind: str, exact: Mapping[str, Any]) -> tuple[str, str]:
    """Class name, and "run", "fits" or why the type is refused.

    Raises:
        Exception: of any class, where transformers does not build the type from its defaults.
    """
    config = exact.get(kind) or small_config(kind)
    auto = auto_class(config)
    found = auto._model_mapping[type(config)]
    name = (found[0] if isinstance(found, tuple) else found).__name__
    try:
        refuse_by_name(config)
        with init_empty_weights(include_buffers=True):
            model = model_from(config, auto)
        BlockRunner(model, _Names(model), torch.float32, torch.device("cpu"))
    except DropError as error:
        return name, shortened(str(error))
    return type(model).__name__, RUN if kind in exact else FITS


def shortened(message: str) -> str:
    """The reason in an error of ours, for a cell of the table."""
    if by_name := re.search(r"are not supported: (.*?)\. Use another", message):
        return f"refused: {by_name[1]}"
    if weights := re.search(r"^(\d+ %|\d+%) of a block's weights.*?: (.*?) \(", message):
        where = re.sub(r"^.*?\d+\.", "", weights[2])
        return f"refused: {weights[1]} of a block is in no linear layer (`{where}`)"
    if "has no single list" in message:
        return "refused: no single list of decoder blocks"
    if "one and the same weight" in message:
        return "refused: weights shared between blocks"
    return "refused: " + message.split(". ")[0].replace("|", "/")


def exact_types() -> dict[str, Any]:
    """Types of which a tiny random model is run block by block in the tests, and its config; None
    for a plain decoder, whose default config has the same structure."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
    import family_models
    import tiny

    configs = {getattr(transformers, name).model_type: None for name, _ in tiny.FAMILIES.values()}
    for family in family_models.DENSE:
        config = family_models.config_of(family)
        configs[config.model_type] = config
    for family in tiny.EXPERTS:
        config = tiny.tiny_config(family)
        configs[config.model_type] = config
    return configs


def types() -> list[str]:
    """All types, in order."""
    names = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    return sorted(names)


def rows(kinds: list[str]) -> Iterator[tuple[str, str]]:
    """Type and its row; an empty row for one that does not build."""
    exact = exact_types()
    transformers.logging.set_verbosity_error()
    for kind in kinds:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                name, result = result_of(kind, exact)
        except Exception as error:  # of whatever a config or a class raises
            print(f"{kind}: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
            yield kind, ""
            continue
        yield kind, f"| `{kind}` | {name} | {result} |"


def page(found: dict[str, str]) -> str:
    """The page with the rows that were found in the place of those it has."""
    text = PAGE.read_text()
    head = text[: text.index(START) + len(START)]
    listed = [row for row in found.values() if row]
    count = {word: sum(row.endswith(f"| {word} |") for row in listed) for word in (RUN, FITS)}
    numbers = (
        f"transformers {transformers.__version__}: of {len(found)} types {count[RUN]} are run in "
        f"the tests, {count[FITS]} fit, {len(listed) - sum(count.values())} are refused, and "
        f"{len(found) - len(listed)} do not build from their default config."
    )
    head = re.sub(r"^transformers \d.*$", numbers, head, flags=re.MULTILINE)
    missing = ", ".join(f"`{kind}`" for kind, row in found.items() if not row)
    return head + "\n".join(listed) + f"\n\nNot built from their defaults: {missing or 'none'}.\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found = dict(rows(arguments.types or types()))
    if arguments.types:
        print("\n".join(found.values()))
    if arguments.check:
        known = PAGE.read_text().splitlines()
        wrong = [kind for kind, row in found.items() if row and row not in known]
        print(f"not as in {PAGE.name}: {', '.join(wrong) or 'none'}", file=sys.stderr)
        return bool(wrong)
    if not arguments.types:
        PAGE.write_text(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
