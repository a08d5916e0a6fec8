"""A precision for each request: `vllm_xargs: {"bits": 2}`, on engines on the CPU.

    Levels          row of the batch -> level, kept by a logits processor: vLLM tells it of every
                    request that comes, goes or moves, before each pass over the model
    rows_by_level   rows of x -> level, from that and from where each request's tokens begin; the
                    operator multiplies the rows of each level by its planes
    register        requests of another level than the engine's keep to their own cached prefixes

A request reads a prefix of the planes that are in memory: any level up to the engine's.

vLLM lets neither a quantization nor a logits processor take part in what identifies a cached
prefix, and keys and values of one level must not serve another. So one function of vLLM's is
wrapped, `InputProcessor.process_inputs`: it refuses what cannot be served, with an answer of status
400, and adds the level to the request's `cache_salt`.

Not on GPUs: rows of several levels in one product need a kernel that masks planes for each row.
There is none, and without one the levels of rows would have to be read on the host.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.forward_context import ForwardContext
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from .config import DropByDropConfig, asked_bits, options_of
from .ops import ROWS


def wanted(params: SamplingParams | None) -> object:
    """What a request says of its level; None if nothing."""
    return ((params.extra_args if params else None) or {}).get("bits")


class Levels(LogitsProcessor):
    """See the module's note.

    Attributes:
        level: of the engine, for all requests that ask for none.
        asked: row of the batch -> level, of those that ask.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        del is_pin_memory
        self.asked: dict[int, int] = {}
        self.level = 0
        config = vllm_config.quant_config
        if isinstance(config, DropByDropConfig) and device.type == "cpu":
            self.level = asked_bits(options_of(vllm_config), config.stored)
            vllm_config.compilation_config.static_forward_context[ROWS] = self

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if self.level:
            process_dict_updates(self.asked, batch_update, lambda params, *_: wanted(params))


Parts = list[tuple[int, torch.Tensor]]


def rows_by_level(levels: Levels, context: ForwardContext, n: int) -> Parts:
    """(level, its rows) of the n rows of x in this pass; empty if all are of the engine's level."""
    metadata = context.attn_metadata
    if not levels.asked or not isinstance(metadata, dict) or not metadata:
        return []
    starts = next(iter(metadata.values())).query_start_loc.tolist()
    rows: dict[int, list[int]] = {}
    for i, (first, last) in enumerate(zip(starts, [*starts[1:], n], strict=True)):
        rows.setdefault(levels.asked.get(i, levels.level), []).extend(range(first, last))
    return [(level, torch.tensor(mine)) for level, mine in rows.items() if mine]


def check_request(config: VllmConfig, bits: Any) -> str | None:
    """What sets the cached prefixes of a request for `bits` apart; None for the engine's own level.

    Raises:
        VLLMValidationError: this engine cannot serve it.
    """
    quant = config.quant_config
    if not isinstance(quant, DropByDropConfig):
        return None
    stored = quant.stored
    level = asked_bits(options_of(config), stored)
    held = [one for one in stored.levels if one <= level]
    tables = {one: stored.table_bits(stored.prefix_of(one)) for one in held}
    if config.device_config.device_type != "cpu":
        why = "a precision for each request is not supported on this device"
    elif config.speculative_config is not None:
        why = "a precision for each request is not supported with speculative decoding"
    elif bits not in held:  # any JSON value
        here = ", ".join(map(str, held))
        why = f"{bits!r} is not a level that this engine holds; it has {here}"
    elif tables[bits] != tables[level]:
        why = (
            f"at {bits} embedding and head have {tables[bits]} bits in planes, and this engine "
            f"holds those of {level}, of {tables[level]} bits"
        )
    else:
        return None if bits == level else f"dropbydrop:{bits}"
    raise VLLMValidationError(f"{why}. Leave 'bits' out, or ask an engine of that level.")


def register() -> None:
    """Wrap `InputProcessor.process_inputs`, once in a process."""
    plain = InputProcessor.process_inputs
    if hasattr(plain, "__wrapped__"):
        return

    @wraps(plain)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = plain(self, *args, **kwargs)
        bits = wanted(request.sampling_params)
        if bits is not None and (salt := check_request(self.vllm_config, bits)):
            request.cache_salt = f"{salt}:{request.cache_salt or ''}"
        return request

    InputProcessor.process_inputs = process_inputs
