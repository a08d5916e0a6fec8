"""How much the loss depends on each token, at the outputs of each input group: weights for H.

An error E of a matrix changes the model's own log-likelihood by, to second order, half of
sum_t E_y (g_t . E x_t)^2, g_t = d log p(y) / d z_t, where z_t = W x_t are its outputs and labels y
are drawn from the model itself (that is its Fisher matrix, and the KL to the original; with the
labels of a text it would be another one). If the rows of E err alike and independently, that is
sum_t |g_t|^2 x_t^T S x_t: every token counts with w_t = |g_t|^2 (GuidedQuant, arXiv 2505.07004, one
group). Labels of different tokens are independent, so one backward pass serves all of them.

Block by block within the memory of the forward walk: a forward pass keeps the input of every block
(pipeline.py of quantization says where), then blocks run again from the last to the first, with
gradients; of a batch only |g_t|^2 is kept, one number a token and input group. Where the processor
multiplies bfloat16, products run in it: what is wanted is the size of a gradient, and one draw of
labels makes it uncertain by far more.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dropbydrop.system.accelerator import multiplies_bfloat16

from .input_groups import codable

if TYPE_CHECKING:
    from .block_runner import BlockRunner

LOGIT_VALUES = 1 << 23  # float32 logits in memory at a time


class TokenGradients:
    """Gradients of one pass, for the blocks of a runner.

    Args:
        seed: of the labels that are drawn; a window's depend on it and on the window's number.
    """

    def __init__(self, runner: BlockRunner, seed: int = 0) -> None:
        self.runner, self.seed = runner, seed
        self._half = multiplies_bfloat16(runner.device)
        self.dtype = torch.bfloat16 if self._half else runner.dtype  # of states on their way

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.runner.device.type, torch.bfloat16, enabled=self._half)

    @torch.no_grad()
    def forward(self, i: int, x: Tensor) -> Tensor:
        """Block i, loaded, on one batch [b, T, D]."""
        with self._autocast():
            return self.runner.apply_block(i, x.to(self.runner.dtype), {})

    def head(self, hidden: Tensor, first: int) -> Tensor:
        """Gradient by the last block's output [b, T, D], float32.

        first: number of the batch's first window in the whole run.
        """
        gradient = torch.empty_like(hidden, dtype=torch.float32)
        vocab = int(self.runner.model.config.get_text_config().vocab_size)
        slab = max(1, LOGIT_VALUES // vocab)
        for w, window in enumerate(hidden):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + first + w)
            draws = torch.rand(len(window), 1, generator=generator).to(hidden.device)
            for low in range(0, len(window), slab):
                part = slice(low, low + slab)
                h = window[None, part].to(self.runner.dtype).detach().requires_grad_()
                with torch.enable_grad(), self._autocast():
                    logits = self.runner.apply_head(h, {})
                slope = _score(logits.detach()[0].float(), draws[part])
                back = torch.autograd.grad(logits, h, slope[None].to(logits.dtype))
                gradient[w : w + 1, part] = back[0]
        return gradient

    def block(
        self, i: int, block: nn.Module, x: Tensor, gradient: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Back through block i, loaded: input x and gradient of the output, [b, T, D].

        Returns:
            gradient of x, and of every linear that every token meets once, by its full name, the
            squared gradient of its outputs: sums over outputs, float32 [b, T].
        """
        found: dict[str, list[Tensor]] = {}
        tokens = x.shape[:2]

        def keep(name: str, g: Tensor) -> None:
            found.setdefault(name, []).append(g.float().square().sum(-1).flatten())

        def hook(name: str, module: nn.Module, args: object, out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(partial(keep, name))

        named = codable(block, self.runner.block_prefix(i)).items()
        handles = [m.register_forward_hook(partial(hook, name)) for name, m in named]
        x = x.detach().requires_grad_()
        try:
            with torch.enable_grad(), self._autocast():
                out = self.runner.apply_block(i, x, {})
            (back,) = torch.autograd.grad(out, x, gradient.to(out.dtype))
        finally:
            for handle in handles:
                handle.remove()
        count = tokens.numel()
        whole = {n: g[0] for n, g in found.items() if len(g) == 1 and g[0].numel() == count}
        return back, {name: g.view(tokens) for name, g in whole.items()}


def _score(logits: Tensor, draws: Tensor) -> Tensor:
    """d log p(y) / d logits for labels y drawn by `draws` [t, 1], uniform in [0, 1): [t, vocab].

    Written over the probabilities; logits [t, vocab] float32.
    """
    p = torch.softmax(logits, -1)
    ends = p.cumsum(-1)
    label = torch.searchsorted(ends, draws * ends[:, -1:], right=True)
    label.clamp_(max=p.shape[1] - 1)
    return p.neg_().scatter_add_(1, label, torch.ones_like(draws))
