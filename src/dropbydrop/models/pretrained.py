"""The one door to transformers' Auto classes: nothing of a folder is ever run.

A folder can ask transformers for more than to read numbers: `auto_map` names Python of the folder
or of a repository, and where `trust_remote_code` is left open transformers asks on the terminal and
takes a `y` from a pipe; `attn_implementation` may name a repository of compiled kernels;
`transformers_weights` and an adapter beside the weights make others be read than those that were
looked at. So every call goes through this module, which says no to the question beforehand and
refuses such folders (`refuse_code`) with the reason. A test looks for calls elsewhere.

What transformers raises while it reads a config has no common base class (dataclass validators,
KeyError, ZeroDivisionError, ...): `config_of` turns all of it into one error.

Some families cap the scores of attention (Gemma 2: 50 tanh(score / 50)). Several releases of
transformers (5.19 among them, 5.23 no more) attend through sdpa for them, which leaves the cap out
in silence: Gemma 2 is another model then. `keep_caps` names eager attention for such configs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    PretrainedConfig,
)

from dropbydrop.system.console import quiet_transformers
from dropbydrop.system.errors import FormatError, UnsupportedModelError, first_line

_READ = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)  # what transformers may read by itself
_AUTO: tuple[Any, ...] = (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)
_ADAPTER = "adapter_config.json"
_MOST_LAYERS = 4096
_WEIGHTS = "transformers_weights"
# Values that name functions of transformers itself. Flash attention is not among them: where the
# package is missing, transformers fetches a kernel for it.
_IMPLEMENTATIONS = {
    "attn_implementation": {"eager", "sdpa", "flex_attention"},
    "experts_implementation": {"eager", "grouped_mm", "batched_mm"},
}


def refuse_code(folder: Path | str) -> None:
    """Refuse a folder that asks to run code, or to have other weights read than its own.

    Raises:
        UnsupportedModelError: with the file and the key.
        FormatError: a file that transformers would read is no JSON object.
    """
    folder = Path(folder)
    for name in _READ:
        if (folder / name).is_file():
            _refuse_keys(folder / name, read_object(folder / name))
    if (folder / _ADAPTER).is_file():
        raise UnsupportedModelError(
            f"{folder} holds an adapter ({_ADAPTER}), which would be mixed into the weights. Merge "
            "it with peft (merge_and_unload) and save the result, or move it out of the folder."
        )


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FormatError: not readable, or something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{file} is not a JSON object ({first_line(error)}).") from error
    if not isinstance(value, dict):
        raise FormatError(f"{file} is not a JSON object (it is a {type(value).__name__}).")
    return value


def _refuse_keys(file: Path, content: Mapping[str, Any]) -> None:
    for key, value in _entries(content):
        if key == "auto_map" and value:
            raise UnsupportedModelError(
                f"{file} has 'auto_map', which asks to run Python of the model's author. That is "
                "never done. If transformers has this architecture itself (pip install -U "
                "transformers), remove the key 'auto_map' from the file; else take another model."
            )
        if key == _WEIGHTS and value:
            raise UnsupportedModelError(
                f"{file} has {_WEIGHTS!r}: {value!r}, which has weights read from another file "
                "than the usual ones. Remove the key and name the file model.safetensors."
            )
        kind = key.removeprefix("_").removesuffix("_internal")
        named = value.values() if isinstance(value, Mapping) else [value]
        if kind in _IMPLEMENTATIONS:
            for choice in named:
                if choice is not None and choice not in _IMPLEMENTATIONS[kind]:
                    raise UnsupportedModelError(
                        f"{file} has {key!r}: {choice!r}, which may fetch a kernel and run it. "
                        "Remove the key: transformers then takes a function of its own."
                    )


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """All keys with their values, at any depth: parts of a config are configs."""
    todo = [content]
    while todo:
        value = todo.pop()
        if isinstance(value, Mapping):
            yield from ((str(key), inner) for key, inner in value.items())
            todo += value.values()
        elif isinstance(value, list):
            todo += value


def config_of(folder: Path | str, **settings: Any) -> PretrainedConfig:
    """The config of a local folder.

    Raises:
        UnsupportedModelError: it asks for code, or transformers makes nothing of it.
        FormatError: no JSON object.
    """
    refuse_code(folder)
    with quiet_transformers():
        try:
            found = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, **settings)
            text = found.get_text_config()
            if not isinstance(text, PretrainedConfig):
                raise ValueError(f"text_config is a {type(text).__name__}")
            layers = getattr(text, "num_hidden_layers", None)
        except Exception as error:  # see the module's note
            raise UnsupportedModelError(
                f"transformers makes nothing of {Path(folder) / 'config.json'}: "
                f"{first_line(error)}. Use a model whose architecture is part of the installed "
                "transformers, with the config that its author published."
            ) from error
    if isinstance(layers, int) and layers > _MOST_LAYERS:  # each costs memory, even on meta
        raise UnsupportedModelError(
            f"{Path(folder) / 'config.json'} asks for {layers:,} layers; models have at most "
            f"{_MOST_LAYERS:,}. The file is damaged: fetch it again."
        )
    keep_caps(found)
    return found


def keep_caps(config: PretrainedConfig) -> None:
    """Choose eager attention for a config whose scores are capped, unless it names a function that
    caps them."""
    text = config.get_text_config()
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    if capped and config._attn_implementation in (None, "sdpa"):
        config._attn_implementation = "eager"


def auto_class(config: PretrainedConfig) -> Any:
    """The Auto class of transformers that builds the class which the config names.

    Where the config names none that generates text, the first one that knows the config.

    Raises:
        UnsupportedModelError: transformers has no class that generates text for the config.
    """
    named = (config.architectures or [""])[0]
    known = []
    for auto in _AUTO:
        if type(config) not in auto._model_mapping:
            continue
        classes = auto._model_mapping[type(config)]
        names = [c.__name__ for c in (classes if isinstance(classes, tuple) else (classes,))]
        if named in names:
            return auto
        known.append(auto)
    if not known:
        raise UnsupportedModelError(
            f"transformers has no class that generates text for model_type {config.model_type!r} "
            f"(architectures: {config.architectures}); use a causal language model."
        )
    return known[0]


def model_from(config: PretrainedConfig, auto: Any = None, **settings: Any) -> Any:
    """A model with fresh weights; raises what transformers raises.

    Args:
        auto: Auto class; by default the one of the class that the config names.
    """
    auto = auto_class(config) if auto is None else auto
    return auto.from_config(config, trust_remote_code=False, **settings)


def read_model(folder: Path | str, auto: Any = None, **settings: Any) -> Any:
    """A local folder as a model, `settings` those of `from_pretrained`; raises what that raises.

    Args:
        auto: Auto class; by default the one of the class that the folder's config names, and for a
            file beside no config that of causal language models.

    Raises:
        UnsupportedModelError: the folder asks for code.
    """
    refuse_code(folder)
    settings = {"use_safetensors": True, **settings}  # never a pickle
    if auto is None and "gguf_file" in settings:
        auto = AutoModelForCausalLM
    elif auto is None:
        if "config" not in settings:
            settings["config"] = config_of(folder)
        auto = auto_class(settings["config"])
    return auto.from_pretrained(str(folder), trust_remote_code=False, **settings)


def read_tokenizer(folder: Path | str, **settings: Any) -> Any:
    """The tokenizer of a local folder; raises what transformers raises.

    Raises:
        UnsupportedModelError: the folder asks for code.
    """
    refuse_code(folder)
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **settings)
