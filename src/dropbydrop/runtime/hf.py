"""The bridge to transformers: `from_pretrained` reads our folders once `register` was called.

Steps of `AutoModelForCausalLM.from_pretrained(out)` that are ours:
1. `DropByDropConfig` parses and validates `quantization_config`; its `bits` is the precision.
2. Before the weights are read, the quantizer opens the checkpoint, checks the planes, puts our
   modules (on the meta device) in place of the linears, and appends the files of planes 1..P to
   the list of files that transformers is about to read. Tensor names on disk equal parameter
   names, so transformers loads them itself, to whatever device it was told.
3. After the weights are read, codes are entered into the `PlaneStore`, and it is checked that
   every tensor of ours has really been read: never a random weight. The native decode step is
   offered to the model (fused_decode.py), and on a GPU one product for all linears of an input
   (fused_groups.py).

Codebooks and rotations belong to no single module; the store reads them, at the end of step 3: what
is loaded needs the folder no more, until further planes are asked for.

Files are compared with the manifest before step 2 ends, every tensor's type and shape with the
model's, and after step 3 it is checked that the folder still holds the files that were compared.
Written against transformers 5.23; tests/test_hf.py exercises every hook that is overridden.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from dropbydrop.checkpoint import Checkpoint, QuantizationConfig
from dropbydrop.checkpoint.config import CONFIG_FILE, FORMAT, REST_FILE, table_inputs_name
from dropbydrop.checkpoint.contents import check_model_config
from dropbydrop.checkpoint.files import read_json
from dropbydrop.checkpoint.tensor_files import DTYPES
from dropbydrop.models.embeddings import output_scale
from dropbydrop.models.key_names import ModuleNames
from dropbydrop.system.errors import DropError, FormatError, UnsupportedModelError

from .experts import NestedExperts, place_experts
from .fused_decode import attach
from .fused_groups import multiply_together
from .int8_modules import NestedEmbedding, NestedHead
from .modules import NestedLinear, NestedModule, group_of, refuse_change
from .plane_store import PlaneStore
from .tables import TableSource

logger = logging.get_logger(__name__)

# What `load` has opened already; `from_pretrained` alone opens the folder itself.
opened: ContextVar[Checkpoint | None] = ContextVar("opened", default=None)


class DropByDropConfig(QuantizationConfigMixin):
    """`quantization_config` as transformers sees it: a validated, read-only value."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method = cast(Any, FORMAT)
        fields.setdefault("quant_method", FORMAT)
        self._quantization = QuantizationConfig.from_dict(fields)

    @property
    def quantization(self) -> QuantizationConfig:
        """The validated description of the checkpoint."""
        return self._quantization

    @property
    def bits(self) -> int:
        """The precision that is (or will be) loaded. Read-only."""
        return self._quantization.bits

    @bits.setter
    def bits(self, value: object) -> None:
        refuse_change(self.bits, value)

    def with_bits(self, bits: int) -> DropByDropConfig:
        """The same description with another precision."""
        return DropByDropConfig(**{**self.to_dict(), "bits": bits})

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self._quantization.to_dict())

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Nothing can be changed this way; everything is returned as unused."""
        return kwargs


class DropByDropQuantizer(HfQuantizer):
    """Puts our modules into a transformers model and has the planes loaded into them."""

    requires_calibration = True  # only folders that are already quantized can be loaded
    quantization_config: DropByDropConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise DropError(
                "device_map offloads modules to disk, which dropbydrop does not support; load at "
                "a lower precision instead."
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before the model is built, which is when transformers would fetch a kernel."""
        from dropbydrop.models.pretrained import keep_caps

        folder = Path(config.name_or_path)
        if opened.get() is None and (folder / CONFIG_FILE).is_file():  # else `load` has looked
            check_model_config(read_json(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
        keep_caps(config)
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files")
        if not files:
            raise FormatError(
                "a dropbydrop model can only be loaded from its folder, not from a state_dict: "
                "use dropbydrop.load(folder, bits=…)."
            )
        checkpoint = opened.get() or Checkpoint.open(Path(files[0]).parent)
        self._folder = checkpoint.path
        if [Path(file).name for file in files] != [REST_FILE]:
            raise FormatError(
                f"transformers is about to read {[Path(file).name for file in files]} of "
                f"{checkpoint.path} in the place of {REST_FILE}. Load without a variant."
            )
        asked = self.quantization_config.quantization
        if asked.to_dict() != {**checkpoint.quantization.to_dict(), "bits": asked.bits}:
            raise FormatError(
                f"the quantization_config given differs from the one in {checkpoint.path}; only "
                "'bits' may be changed."
            )
        prefix = checkpoint.quantization.prefix_of(asked.bits)
        checkpoint.check_contents(prefix)
        with torch.device("meta"):
            place_modules(model, checkpoint, prefix, kwargs.get("dtype"))
        _check_parameters(model, checkpoint)
        # The same list object is read afterwards; a copy would leave the codes unread, which
        # _process_model_after_weight_loading refuses.
        files.extend(str(p) for m in range(1, prefix + 1) for p in checkpoint.plane_paths(m))
        quiet = [f"^{re.escape(name)}$" for name in checkpoint.quantization.guards]
        quiet.append(r"^(codebooks|input_groups|rotations)\.")
        for table in checkpoint.quantization.tables:  # read by `settle`
            leaf = re.escape(table.rpartition(".")[2])
            quiet.append(rf"(^|\.){leaf}\.(codes\.\d+|input_scales)$")
        already = model._keys_to_ignore_on_load_unexpected  # in the first 5.x None or a list
        model._keys_to_ignore_on_load_unexpected = (
            {*already, *quiet} if isinstance(already, set) else [*(already or ()), *quiet]
        )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        coded = [m for m in model.modules() if isinstance(m, NestedModule)]
        for store in {one.store for one in coded}:
            store.checkpoint.unchanged()  # transformers has read the files by their names
        for name, tensor in _our_tensors(model):
            if not getattr(tensor, "_is_hf_initialized", False) or tensor.is_meta:
                raise DropError(
                    f"{name} was not loaded (offloaded, or this version of transformers reads "
                    "files in another way). Load without offloading, with a supported version."
                )
        for module in model.modules():
            if isinstance(module, (NestedModule, NestedEmbedding, NestedHead)):
                module.requires_grad_(False)  # transformers makes every float a leaf to train
        for one in coded:
            one.codes.settle()
            one.store.add(one.name, one.codes.held())
            _ = one.input_group  # read now, whatever happens to the folder later
        _settle_tables(model)
        attach(model, group_of)
        multiply_together(model)
        return model

    def is_serializable(self) -> bool:
        logger.warning(
            "A loaded dropbydrop model is not written back: it may hold only some planes of its "
            f"checkpoint. Copy the folder {getattr(self, '_folder', '')} instead. To save one "
            "precision as an ordinary dense model, call model.dequantize() first."
        )
        return False

    @property
    def is_trainable(self) -> bool:
        return False

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Put dense layers of this precision back in place (`model.dequantize()`)."""
        dtype = dtype or model.dtype
        for name, module in list(model.named_modules()):
            if isinstance(module, NestedExperts):
                module.dequantize(dtype)
            elif isinstance(module, (NestedLinear, NestedHead)):
                model.set_submodule(name, _dense(module, dtype))
            elif isinstance(module, NestedEmbedding):
                model.set_submodule(name, module.dense(dtype))
        model.__dict__.pop("_tied_weights_keys", None)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        model.tie_weights()
        return model


def place_modules(model: Any, checkpoint: Checkpoint, prefix: int, dtype: Any) -> None:
    """Replace linears, embeddings and head of a model on the meta device by our modules."""
    store, spec = PlaneStore(checkpoint), checkpoint.quantization.embeddings
    names = ModuleNames(model)
    for stored, matrix in checkpoint.shapes.items():
        if len(matrix) == 3:
            continue  # a stack of experts
        d_out, d_in = matrix
        name, old = _find(model, names, stored)
        if old is None:
            continue
        if not isinstance(old, nn.Linear) or (old.out_features, old.in_features) != (d_out, d_in):
            raise FormatError(
                f"{stored} is a matrix of [{d_out}, {d_in}] in the checkpoint, but {old} in "
                f"{type(model).__name__}: config.json is of another model. Fetch it again."
            )
        model.set_submodule(name, NestedLinear(store, stored, prefix, old.bias))
    stacks = [stored for stored, matrix in checkpoint.shapes.items() if len(matrix) == 3]
    for owner in dict.fromkeys(stored.rpartition(".")[0] for stored in stacks):
        _, experts = _find(model, names, owner)
        if experts is not None:
            place_experts(experts, owner, store, prefix)
    if spec.bits == 16:
        return
    for stored in spec.modules:
        name, old = _find(model, names, stored)
        if old is None:
            continue
        source = None
        if spec.by_level:
            count = checkpoint.quantization.table_prefix(prefix)
            source = TableSource(store, stored, count)
        if source is None:
            rows = checkpoint.rest[f"{stored}.rows"].shape
        else:
            parts = f"{stored}.scales", table_inputs_name(stored)
            rows = tuple(checkpoint.rest[part].shape[0] for part in parts)
        scale = output_scale(old)
        if scale is not None and tuple(cast(nn.Embedding, old).weight.shape) == rows:
            dtype = dtype or torch.get_default_dtype()
            kind = cast("type[nn.Embedding]", type(old))
            table = NestedEmbedding(rows[0], rows[1], dtype, scale, kind, source)
            model.set_submodule(name, table)
        elif type(old) is nn.Linear and tuple(old.weight.shape) == rows:
            model.set_submodule(name, NestedHead(rows[0], rows[1], old.bias, False, source))
        else:
            raise UnsupportedModelError(
                f"{stored} has rows {list(rows)} in the checkpoint, but is {old} in "
                f"{type(model).__name__}; quantize this model with --head-bits 16."
            )
    if spec.tied:
        _tie_head(model)


def _check_parameters(model: Any, checkpoint: Checkpoint) -> None:
    """Every stored tensor of a model on the meta device must have the shape of its parameter.

    Tensors that this class has no place for (the head of another task) are transformers' to ignore.
    """
    places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, info in checkpoint.rest.items():
        place = places.get(name, places.get(name.removeprefix(f"{model.base_model_prefix}.")))
        if place is None or name in checkpoint.quantization.guards:
            continue
        same_kind = DTYPES[info.dtype].is_floating_point == place.is_floating_point()
        if tuple(place.shape) != info.shape or not same_kind:
            raise FormatError(
                f"{name} is {info} in {checkpoint.path}, but {list(place.shape)} of {place.dtype} "
                f"in {type(model).__name__}: config.json is of another model, or the file is "
                "damaged. Fetch it again."
            )


def _tie_head(model: Any) -> None:
    """Replace a tied output head by one that shares the embedding's rows."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or isinstance(head, NestedLinear):  # a bare decoder, or a quantized head
        return
    names = {id(module): name for name, module in model.named_modules()}
    source, target = names[id(embedding)], names[id(head)]
    tied = {k: v for k, v in model.all_tied_weights_keys.items() if k != f"{target}.weight"}
    if len(tied) == len(model.all_tied_weights_keys) or type(head) is not nn.Linear:
        raise FormatError(
            f"the checkpoint ties {target} to {source}, but {type(model).__name__} does not "
            "(tie_word_embeddings in config.json). Fetch config.json again."
        )
    vocab, dim, planes = embedding.num_embeddings, embedding.embedding_dim, embedding.source
    model.set_submodule(target, NestedHead(vocab, dim, head.bias, tied=True, source=planes))
    if planes is None:  # else `_settle_tables` gives both the same rows
        tied[f"{target}.rows"] = f"{source}.rows"
    # all_tied_weights_keys serves the loader, _tied_weights_keys later calls of tie_weights().
    model.all_tied_weights_keys, model._tied_weights_keys = tied, dict(tied)


def _settle_tables(model: Any) -> None:
    """Rows of tables in planes; and what a tied head shares with the embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for module in (embedding, head):
        if isinstance(module, (NestedEmbedding, NestedHead)) and module.source is not None:
            own = embedding if isinstance(module, NestedHead) and module.tied else module
            module.settle(own.scales.device)
    if isinstance(head, NestedHead) and head.tied and head.source is None:
        head.row_scales = embedding.row_scales.to(head.rows.device)


def _find(model: Any, names: ModuleNames, stored: str) -> tuple[str, nn.Module | None]:
    """A module by its name in the checkpoint, which may be of another class.

    Returns (name, None) for a module that this class rightly lacks: the head of another task.
    """
    # a bare decoder lacks the prefix; that of a wrapper has another one
    for name in (stored, stored.removeprefix(f"{model.base_model_prefix}."), names.find(stored)):
        with suppress(AttributeError):
            return name, cast(nn.Module, model.get_submodule(name))
    same_class = type(model).__name__ in (model.config.architectures or ())
    if same_class or stored.startswith(f"{model.base_model_prefix}."):
        raise FormatError(
            f"{stored} is quantized in the checkpoint, but {type(model).__name__} has no such "
            "module: config.json is of another model, or this transformers names it differently."
        )
    return stored, None


def _our_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of our modules, except what is tied to others of them."""
    for name, module in model.named_modules():
        if isinstance(module, (NestedModule, NestedEmbedding, NestedHead)):
            for leaf, tensor in (*module.named_parameters(), *module.named_buffers()):
                if not (isinstance(module, NestedHead) and module.tied and leaf == "rows"):
                    yield f"{name}.{leaf}", tensor


def _dense(module: NestedLinear | NestedHead, dtype: torch.dtype) -> nn.Linear:
    weight = module.dense_weight(dtype)
    dense = nn.Linear(module.in_features, module.out_features, module.bias is not None, "meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    return dense


def register() -> None:
    """Make transformers know `quant_method: dropbydrop`. Safe to call again."""
    if FORMAT not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(FORMAT)(DropByDropConfig)
    if FORMAT not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(FORMAT)(DropByDropQuantizer)
