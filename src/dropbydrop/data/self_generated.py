"""Calibration text that the model writes itself: no data needed, and in its own distribution.

All texts are sampled at once, one token a step, with a key/value cache; a step of 128 texts is a
matrix product of 128 rows, so a token costs a small part of what it costs in `generate`. A window
is filled by texts of at most 512 tokens: half the attention and the same matrix products as one
long text, and more topics. That length and the other figures below are those of `Writing`
unless the caller gives another.

Two kinds of text:
- bare text: [BOS if the tokenizer adds one,] a random ordinary token of the vocabulary, then
  samples. The random start spreads the topics (LLM-QAT, Liu et al. 2023, section 3.1); one token is
  enough, the model finds its way from it. At an end token the next document starts the same way.
- conversation, every second text when the tokenizer has a chat template: the template up to the
  user's words, samples until the end of the turn (at most 128 tokens), the template's text up to
  the answer, samples to the end of the answer, then a new conversation (Magpie, Xu et al. 2024).

Tokens are drawn from softmax(logits / temperature), at temperature 1 and without truncation, with
one seeded generator: the same seed, machine and build give the same text.

The model writes on the device it is quantized on, in bfloat16 where that multiplies it natively
(three times as fast; the text is a sample of the same distribution up to rounding), in float32
elsewhere.

Memory beside the model: keys and values of every text, what state-space layers keep of it, and its
logits. That is measured with one token. A batch has as many texts as keep all of it and the model
below `TOTAL_BYTES`; beside a larger model they may have `LEAST_BYTES`.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dropbydrop.models.cached import continue_cache, wants_positions
from dropbydrop.models.chat_template import in_chat_template
from dropbydrop.models.embeddings import embedded_tokens
from dropbydrop.models.pretrained import read_model
from dropbydrop.system.accelerator import multiplies_bfloat16
from dropbydrop.system.console import progress_bar, quiet_transformers
from dropbydrop.system.errors import DropError

from .kv_slots import bytes_of_text, cache_with_room, slots_of
from .text_files import leading_bos

LEAST_BYTES, TOTAL_BYTES = 1 << 30, 7 << 28  # 1 GiB, 1.75 GiB
_ROWS = 16  # whose probabilities are in memory at a time
_MARK = "DROPBYDROP"
_FOLDED = "dropbydrop_folded"  # name of our attention function in transformers


@dataclass(frozen=True)
class Writing:
    """How a model writes its calibration text.

    Attributes:
        temperature: of the sampling, above 0.
        text_tokens: longest text; a window is filled by as many as it takes.
        conversations: share of the texts that are conversations, where the tokenizer has a template
            for them; 0 to 1. The others are bare text.
        user_tokens: longest turn of a user in a conversation.

    Raises:
        ValueError: out of these ranges.
    """

    temperature: float = 1.0
    text_tokens: int = 512
    conversations: float = 0.5
    user_tokens: int = 128

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and 0 <= self.conversations <= 1):
            raise ValueError(
                f"temperature {self.temperature} must be positive, and the share of "
                f"conversations {self.conversations} between 0 and 1"
            )
        if self.text_tokens < 2 or self.user_tokens < 1:
            raise ValueError(
                f"texts of {self.text_tokens} tokens and turns of {self.user_tokens}: a text needs "
                "at least 2, a turn at least 1"
            )


def _folded_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # some families name it
    **settings: Any,
) -> tuple[Tensor, None]:
    """sdpa of one new token, with the query heads of a group as rows of one product.

    torch's kernel takes [b, heads, 1, d] head by head; as [b, groups, heads per group, d] every key
    is read once (a fourth of the time in bfloat16). Longer queries go to the usual function.
    """
    alone: Any = _Ungrouped
    mask = attention_mask
    b, heads, new, d = query.shape
    groups = key.shape[1]
    plain = settings.get("position_bias") is None and (mask is None or mask.shape[1:3] == (1, 1))
    if new == 1 and plain:
        query = query.reshape(b, groups, heads // groups, d)
        settings["is_causal"] = False
        out, _ = sdpa_attention_forward(alone, query, key, value, mask, **settings)
        return out.transpose(1, 2).reshape(b, 1, heads, value.shape[-1]), None
    return sdpa_attention_forward(module, query, key, value, mask, **settings)


class _Ungrouped:
    """What transformers asks the attention module: as many key heads as query heads, inference."""

    num_key_value_groups = 1
    is_causal = False
    training = False


class _Writer:
    """Decides, for one text, which tokens are given and which are sampled."""

    def __init__(
        self,
        chat: tuple[list[int], list[int]] | None,
        start: Any,
        ends: set[int],
        longest: int = Writing.user_tokens,
    ):
        self.chat, self.start, self.ends = chat, start, ends
        self.longest = longest  # turn of a user
        self.given: deque[int] = deque()
        self.user_tokens: int | None = None  # sampled so far in a user's turn; None outside
        self._begin()

    def _begin(self) -> None:
        if self.chat is None:
            self.given.extend(self.start())
        else:
            self.given.extend(self.chat[0])
            self.user_tokens = 0

    def next(self, sampled: int) -> int:
        """The token that stands next, given the one the model would choose."""
        if self.given:
            return self.given.popleft()
        token, over = sampled, sampled in self.ends
        if self.chat is not None and self.user_tokens is not None:
            self.user_tokens += 1
            if over or self.user_tokens > self.longest:
                # the template's own end of turn replaces the sampled one
                self.given.extend(self.chat[1])
                self.user_tokens = None
                return self.given.popleft()
        elif over:
            self._begin()
        return token


def write_windows(
    folder: Path,
    tokenizer: Any,
    n: int,
    seq_len: int,
    seed: int,
    writing: Writing,
    progress: bool = True,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Sample `n` windows of `seq_len` tokens from the model in `folder`: int64 [n, seq_len].

    Raises:
        UnsupportedModelError: the model cannot continue a text from a cache (`wants_positions`).
    """
    model = open_model(folder, device)
    told = wants_positions(model, partial(cache_with_room, model))
    generator = torch.Generator().manual_seed(seed)
    pieces, length = texts_of(seq_len, writing)
    writers = _writers(model, tokenizer, n * pieces, writing, generator)
    size = batch_size(model, n * pieces, length)
    batches = [writers[low : low + size] for low in range(0, n * pieces, size)]
    with progress_bar(progress) as bar:
        task = bar.add_task("writing calibration text", total=length * len(batches))
        heat, advance = writing.temperature, partial(bar.advance, task)
        parts = [_sample(model, batch, length, heat, generator, advance, told) for batch in batches]
    return torch.cat(parts).view(n, pieces * length)[:, :seq_len].contiguous()


def writing_seconds(
    folder: Path, n: int, seq_len: int, writing: Writing, device: torch.device | str = "cpu"
) -> float:
    """Seconds that `write_windows` would take with the same arguments, without writing.

    The model is loaded, and steps are timed with an empty, a half full and a full cache (Simpson's
    rule over the positions). Memory peaks as it would.
    """
    started = time.perf_counter()
    model = open_model(folder, device)
    loading = time.perf_counter() - started
    pieces, length = texts_of(seq_len, writing)
    size = batch_size(model, n * pieces, length)
    cache, generator = cache_with_room(model, length), torch.Generator().manual_seed(0)
    tokens = torch.zeros(size, 1, dtype=torch.int64, device=model.device)

    @torch.inference_mode()
    def step(position: int) -> float:
        for layer in slots_of(cache):
            layer.seek(position)
        started = time.perf_counter()
        logits = model(tokens, past_key_values=cache, use_cache=True).logits[:, -1]
        draw(logits, writing.temperature, generator).tolist()
        return time.perf_counter() - started

    step(0)
    with torch.inference_mode():
        for layer in slots_of(cache):
            layer.clear()
    first, middle, last = (
        sum(step(p) for _ in range(3)) / 3 for p in (0, length // 2, max(0, length - 1))
    )
    batches = -(-n * pieces // size)
    return loading + (first + 4 * middle + last) / 6 * length * batches


def texts_of(seq_len: int, writing: Writing) -> tuple[int, int]:
    """How many texts fill a window, and their tokens."""
    pieces = -(-seq_len // writing.text_tokens)
    return pieces, -(-seq_len // pieces)


def open_model(folder: Path, device: torch.device | str = "cpu") -> Any:
    """The model in `folder` on `device`, in the type it writes in."""
    place = torch.device(device)
    kind = torch.bfloat16 if multiplies_bfloat16(place) else torch.float32
    with quiet_transformers():
        model: Any = read_model(folder, dtype=kind)
    if place.type == "cpu":
        fold_attention(model)
    return model.to(place).eval()


def fold_attention(model: Any) -> bool:
    """Let a model attend as above, if it uses sdpa (others have their reasons). Whether it does."""
    if model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(_FOLDED, _folded_attention)
    AttentionMaskInterface.register(_FOLDED, sdpa_mask)
    model.set_attn_implementation(_FOLDED)
    return True


def batch_size(model: Any, texts: int, length: int) -> int:
    """How many texts of `length` tokens are sampled together: equal batches whose memory fits."""
    room = max(LEAST_BYTES, TOTAL_BYTES - model.get_memory_footprint())
    batches = -(-texts // max(1, room // bytes_of_text(model, length)))
    return -(-texts // batches)


@torch.inference_mode()
def _sample(
    model: Any,
    writers: list[_Writer],
    seq_len: int,
    temperature: float,
    generator: torch.Generator,
    advance: Any,
    told: bool,
) -> Tensor:
    """One batch of texts, int64 [texts, seq_len]. told: see `continue_cache`."""
    cache = cache_with_room(model, seq_len)
    out = torch.empty(len(writers), seq_len, dtype=torch.int64)
    drawn = [0] * len(writers)  # ignored: every text begins with a given token
    for position in range(seq_len):
        out[:, position] = torch.tensor([w.next(d) for w, d in zip(writers, drawn, strict=True)])
        if position + 1 < seq_len:
            step = out[:, position : position + 1].to(model.device)
            logits = continue_cache(model, step, cache, position, told)[:, -1]
            drawn = draw(logits, temperature, generator).tolist()
        advance()
    return out


def draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One sample a row of softmax(logits / temperature), by inverting the cumulative sum.

    One uniform number a row, where `torch.multinomial` draws one for every entry of the vocabulary.
    logits [b, vocab] -> int64 [b].
    """
    drawn = []
    uniform = torch.rand(logits.shape[0], 1, generator=generator).to(logits.device)
    for rows, u in zip(logits.split(_ROWS), uniform.split(_ROWS), strict=True):
        total = torch.softmax(rows.to(torch.float32) / temperature, dim=-1).cumsum(-1)
        drawn.append(torch.searchsorted(total, u * total[:, -1:], right=True)[:, 0])
    return torch.cat(drawn).clamp(max=logits.shape[-1] - 1)


def _writers(
    model: Any, tokenizer: Any, n: int, writing: Writing, generator: torch.Generator
) -> list[_Writer]:
    """Bare text and, where there is a template, their share of conversations, evenly spread."""
    special = set(tokenizer.all_special_ids)
    vocab = min(len(tokenizer), embedded_tokens(model))
    ordinary = [i for i in range(vocab) if i not in special]
    bos = leading_bos(tokenizer)

    def start() -> list[int]:
        pick = int(torch.randint(0, len(ordinary), (1,), generator=generator))
        return [*([] if bos is None else [bos]), ordinary[pick]]

    chat = chat_parts(tokenizer)
    ends = _end_tokens(model, tokenizer)
    if chat is not None and chat[1][0] in special:
        ends.add(chat[1][0])
    talks = [
        int((i + 1) * writing.conversations) > int(i * writing.conversations) for i in range(n)
    ]
    return [_Writer(chat if talk else None, start, ends, writing.user_tokens) for talk in talks]


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    ends = {tokenizer.eos_token_id}
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends.update(configured if isinstance(configured, list) else [configured])
    return {int(i) for i in ends if i is not None}


def chat_parts(tokenizer: Any) -> tuple[list[int], list[int]] | None:
    """Token ids before the user's words and between them and the answer, or None.

    None without a chat template, or with one that does not repeat the user's words.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        text = in_chat_template(tokenizer, [{"role": "user", "content": _MARK}])
    except DropError:  # bare text will do
        return None
    before, mark, after = text.partition(_MARK)
    if not mark or not before or not after:
        return None
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after)]
    return (ids[0], ids[1]) if all(ids) else None
