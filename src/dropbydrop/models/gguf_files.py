"""A GGUF file into a plain float32 folder in the cache, in little memory.

transformers reads a GGUF's config and tokenizer. Its reading of weights dequantizes all of them and
then copies them into a model: 2.5 GiB for one of 1.0 GiB in float32. Where the tensors of a family
differ from transformers' by no more than their names, the order of rows of q and k, or a 1 that
llama.cpp adds to norms (`_FAMILIES`), this module writes them itself: the header of the safetensors
file, then tensor after tensor, large ones in runs of rows. The names are those of the table in the
package `gguf`. Tests compare every family with what transformers makes of the file.

Other families, and files in which a parameter has no tensor of its own, go through transformers.

A conversion is written to a temporary folder and renamed, so an interrupted one leaves nothing; one
that is damaged later (its digest differs) is made again.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropbydrop.system.atomic_folder import remove, replacing
from dropbydrop.system.cache import cache_dir
from dropbydrop.system.console import phase, quiet_transformers
from dropbydrop.system.digest import file_digest, model_digest
from dropbydrop.system.errors import DropError, FormatError, first_line
from dropbydrop.system.file_errors import file_errors

from .weight_files import SINGLE

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_GGUF = "model.gguf"
_DIGEST = "dropbydrop.sha256"  # of a converted folder: what it must still be when it is used
_OTHER_CACHE = "DROPBYDROP_CACHE names another folder for what is converted once."
_PERMUTED, _SHIFTED, _PLAIN = "q and k in llama.cpp's order", "norms plus 1", "names alone"
_FAMILIES = {  # general.architecture of a file -> what is to be undone
    "llama": _PERMUTED,  # Mistral too
    "qwen2": _PLAIN,
    "qwen3": _PLAIN,
    "phi3": _PLAIN,
    "gemma2": _SHIFTED,
    "gemma3": _SHIFTED,
}
_PART = 16 << 20  # bytes of float32 that are dequantized at a time


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
    """Write what a GGUF holds as a plain float32 folder."""
    from .pretrained import read_tokenizer

    # the GGUF reader draws a progress bar of its own that no setting turns off
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()), _alone(file) as place:
        try:
            if not _write_tensor_by_tensor(place, folder):
                _write_whole(place, folder)
            gc.collect()  # modules are full of cycles
            read_tokenizer(place, gguf_file=_GGUF).save_pretrained(folder)
        except Exception as error:  # of a reader that checks little: any kind
            raise FormatError(
                f"transformers cannot read {file}: {first_line(error)}. Give another GGUF, or "
                "the model's Hugging Face folder."
            ) from error
    gc.collect()


def _write_whole(place: Path, folder: Path) -> None:
    """Load the GGUF with transformers and save it: several times the model's memory."""
    import torch

    from .pretrained import read_model

    model = read_model(place, gguf_file=_GGUF, dtype=torch.float32)
    # The weights are plain float32 now; what remembers the GGUF must not reach the config.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)


# ---- tensor by tensor --------------------------------------------------------------------------


def _write_tensor_by_tensor(place: Path, folder: Path) -> bool:
    """Write config and weights; False, with nothing written, where this is not for the file."""
    from gguf import GGUFReader

    reader = GGUFReader(place / _GGUF)
    field = reader.fields.get("general.architecture")
    arch = None if field is None else str(field.contents())
    if arch not in _FAMILIES:
        return False
    tensors = {str(tensor.name): tensor for tensor in reader.tensors}
    del reader  # its lists of a large vocabulary take more than the model
    model = _empty_model(place)
    names = _tensor_names(model, arch)
    if names is None or not tensors.keys() >= set(names.values()):
        return False
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    heads = _heads(model.config) if _FAMILIES[arch] == _PERMUTED else {}
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    with (folder / SINGLE).open("wb") as file:
        file.write(_header({name: shapes[name] for name in names}))
        for name, stored in names.items():
            written = 0
            for part in _parts(tensors.pop(stored), _FAMILIES[arch], heads):
                written += file.write(part.data)
            if written != 4 * math.prod(shapes[name]):
                raise ValueError(f"{stored} has {written // 4:,} values, not {shapes[name]}")
    return True


def _empty_model(place: Path) -> Any:
    """The file's model, all of it on the meta device."""
    import torch

    from .pretrained import config_of, model_from

    config = config_of(place, gguf_file=_GGUF)
    with torch.device("meta"):
        return model_from(config, dtype=torch.float32)


def _tensor_names(model: Any, arch: str) -> dict[str, str] | None:
    """Parameter -> its tensor in the file; None where one has none of its own."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = {name: number for number, name in MODEL_ARCH_NAMES.items()}[arch]
    table = get_tensor_name_map(number, model.config.num_hidden_layers)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    found: dict[str, str] = {}
    for name in model.state_dict():
        if name not in tied:
            path, _, leaf = name.rpartition(".")
            if (stored := table.get_name(path)) is None:
                return None
            found[name] = f"{stored}.{leaf}"
    return found


def _heads(config: Any) -> dict[str, int]:
    """Number of heads whose rows llama.cpp has put in another order, by a part of the name."""
    return {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}


def _parts(tensor: Any, undo: str, heads: Mapping[str, int]) -> Iterator[Array]:
    """A tensor in float32, as transformers has it, in runs of its rows."""
    import numpy as np
    from gguf import dequantize

    data, name = tensor.data, str(tensor.name)
    count = next((count for part, count in heads.items() if part in name), 0)
    size = 4 * int(tensor.n_elements)
    pieces = 1 if count or data.ndim < 2 else max(1, min(len(data), -(-size // _PART)))
    for piece in np.array_split(data, pieces):
        values = np.ascontiguousarray(dequantize(piece, tensor.tensor_type), dtype=np.float32)
        if count:  # [heads, half, 2, ...] -> [heads, 2, half, ...]
            halves = values.reshape(count, len(values) // count // 2, 2, *values.shape[1:])
            values = np.ascontiguousarray(halves.swapaxes(1, 2))
        if undo == _SHIFTED and name.endswith("norm.weight"):
            values = values - 1
        yield values


def _header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """What a safetensors file of float32 tensors begins with; they follow in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# ---- files -------------------------------------------------------------------------------------


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
