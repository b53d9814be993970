"""The projection onto the vocabulary: the largest matrix product of a small language model, and most of its memory.

Shapes: N positions, d channels, V vocabulary, c positions of one block.

Log-probabilities of chosen tokens need one row of V logits per position, and nothing of it afterwards. So the logits
are made for a block of positions at a time, forward and backward; all [N, V] of them never exist at once. (The idea is
that of fused linear cross-entropy, Hsu et al. 2024, "Liger Kernel"; theirs needs the loss to be a mean
that is known in the forward pass. A PPO loss is not, but the derivative of a token's log-probability by its hidden
state is: it is kept, [N, d], and the backward pass scales it.)

Under bf16 or fp16 autocast both factors are rounded to that type, with two precautions, because GPT-2's logits share a
large offset (some -30 to -100), where bf16 is spaced 0.25 to 0.5 apart, as much as PPO's clip range:

- the token table is centred over the vocabulary. That shifts all logits of a position by the same number, which no
  softmax sees, and takes the offset away before it meets a rounding;
- the product is taken twice. The second pass starts from minus the rounded result of the first, inside the fp32
  accumulator, and so returns what the rounding lost; their sum is good to about 16 bits. Two bf16 products are cheaper
  than one in fp32.

What is left is the rounding of the factors, about 0.02 in the worst logit. Where a log-probability is wanted, the logit
of its token is taken once more in fp32, one dot product per position; the errors of the others partly cancel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.linear import fill_rows, product
from models.packing import kept_with, pack, packed_linear, packed_linear_minus

BLOCK = 2**25
"""Logits that exist at the same time: 128 MB in fp32, 667 positions of GPT-2's vocabulary."""


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which matrix products of x are taken here: autocast's where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@dataclass
class OutputTable:
    """A token table [V, d] as the output projection uses it.

    weight: [V, d]; in half precision centred over the vocabulary.
    packed: the same in the layout that oneDNN's matrix product reads fastest, on a CPU in half precision; else None.
    exact: the unrounded table [>= V, d] and its mean over the vocabulary [d]; None where `weight` is exact.
    """

    weight: Tensor
    packed: Tensor | None = None
    exact: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, table: nn.Parameter, vocab_size: int, dtype: torch.dtype) -> OutputTable:
        """The projection for a token table, whose rows from `vocab_size` on are padding without logits.

        In half precision it is kept with the parameter until that changes: roles that share a table share it as well.
        """
        if dtype not in (torch.bfloat16, torch.float16):
            return cls(table[:vocab_size].to(dtype))
        return kept_with(
            table, "output_table", (vocab_size, dtype), lambda: cls._centred(table.detach()[:vocab_size], dtype)
        )

    @classmethod
    def _centred(cls, rows: Tensor, dtype: torch.dtype) -> OutputTable:
        mean = rows.mean(0, dtype=torch.float32)
        weight = (rows - mean).to(dtype)
        return cls(weight, pack(weight), (rows, mean))

    def logits(self, hidden: Tensor) -> Tensor:
        """[c, V] in fp32 (fp64 stays fp64) from hidden states [c, d]; in half precision up to a constant per row."""
        hidden = hidden.to(self.weight.dtype)
        if not _is_half(self.weight):
            return product(hidden, self.weight)
        if self.packed is not None:
            first = packed_linear(hidden, self.packed, None)
            rest = packed_linear_minus(hidden, self.packed, first)
        else:
            first = F.linear(hidden, self.weight)
            rest = torch.addmm(first, hidden, self.weight.t(), beta=-1)
        return first.float().add_(rest)

    def correct(self, logits: Tensor, hidden: Tensor, tokens: Tensor) -> None:
        """Put the fp32 product in place of the logit of each position's token [c, 1]."""
        if self.exact is not None:
            rows, mean = self.exact
            logits.scatter_(-1, tokens, ((rows[tokens.squeeze(-1)] - mean) * hidden.float()).sum(-1, keepdim=True))


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


def logits(hidden: Tensor, table: nn.Parameter, vocab_size: int) -> Tensor:
    """Logits [..., V] in fp32 of hidden states [..., d], differentiable; in half precision up to a constant per row."""
    dtype = product_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        if not torch.is_grad_enabled() or not (hidden.requires_grad or table.requires_grad):
            flat = OutputTable.of(table, vocab_size, dtype).logits(hidden.reshape(-1, hidden.shape[-1]))
            return flat.view(*hidden.shape[:-1], vocab_size)
        # A caller who wants gradients through all logits has room for them in fp32, too.
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        return F.linear(wide, table[:vocab_size].to(wide.dtype))


def token_logprobs(hidden: Tensor, table: nn.Parameter, vocab_size: int, tokens: Tensor, tau: float = 1.0) -> Tensor:
    """Log-probability of each token under the tempered softmax, differentiable, block by block.

    Args:
        hidden: [N, d] final hidden states in which the tokens were chosen.
        table: the token table [>= V, d], tied to the output.
        tokens: [N] int64 in [0, V).
        tau: sampling temperature.

    Returns:
        [N] fp32, nats; equal to `utils.loss.gather_logprobs` of the logits.
    """
    return _TokenLogprobs.apply(hidden, table, vocab_size, tokens, tau, product_dtype(hidden))


@torch.no_grad()
def token_logprobs_and_entropy(
    hidden: Tensor, table: nn.Parameter, vocab_size: int, tokens: Tensor, tau: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` and the exact entropy [N] of the tempered softmax, in nats; without gradients."""
    output = OutputTable.of(table, vocab_size, product_dtype(hidden))
    return _sweep(hidden, output, tokens, tau, entropy=True)[:2]


def token_loss_sum(hidden: Tensor, table: nn.Parameter, vocab_size: int, tokens: Tensor) -> Tensor:
    """Sum of the tokens' cross-entropies in nats, differentiable; its gradients are made with it, block by block.

    The same sum as `-token_logprobs(...).sum()`, and cheaper where the table trains: its gradient needs no second
    forward pass, since every token counts alike.
    """
    return _TokenLossSum.apply(hidden, table, vocab_size, tokens, product_dtype(hidden))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, table, vocab_size, tokens, tau, dtype):
        wants_hidden, ctx.wants_table = ctx.needs_input_grad[:2]
        output = OutputTable.of(table, vocab_size, dtype)
        logp, _, slope, _ = _sweep(hidden, output, tokens, tau, slope=wants_hidden)
        ctx.save_for_backward(hidden if ctx.wants_table else None, slope, tokens)
        ctx.table, ctx.vocab_size, ctx.tau, ctx.dtype = table, vocab_size, tau, dtype
        return logp

    @staticmethod
    def backward(ctx, grad):
        hidden, slope, tokens = ctx.saved_tensors
        to_table = None
        if ctx.wants_table:  # what each token counts for is known only now, so the softmax is made again
            output = OutputTable.of(ctx.table, ctx.vocab_size, ctx.dtype)
            to_table = _sweep(hidden, output, tokens, ctx.tau, weights=grad)[3]
            to_table = _like_table(to_table, ctx.table)
        return None if slope is None else grad[:, None].to(slope.dtype) * slope, to_table, None, None, None, None


class _TokenLossSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, table, vocab_size, tokens, dtype):
        wants_hidden, wants_table = ctx.needs_input_grad[:2]
        output = OutputTable.of(table, vocab_size, dtype)
        weights = hidden.new_full(tokens.shape, -1.0, dtype=_wide(hidden)) if wants_table else None
        logp, _, slope, to_table = _sweep(hidden, output, tokens, 1.0, slope=wants_hidden, weights=weights)
        ctx.save_for_backward(slope, to_table)
        ctx.table = table
        return -logp.sum()

    @staticmethod
    def backward(ctx, grad):
        slope, to_table = ctx.saved_tensors
        if to_table is not None:
            to_table = _like_table(to_table * grad, ctx.table)
        return None if slope is None else slope * -grad, to_table, None, None, None


def _sweep(
    hidden: Tensor, output: OutputTable, tokens: Tensor, tau: float, *,
    entropy: bool = False, slope: bool = False, weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """One pass over all positions, a block of logits at a time.

    Args:
        hidden: [N, d]. tokens: [N]. weights: [N] or None, what each log-probability counts for in a loss.

    Returns:
        logp [N]; with `entropy` the entropy [N]; with `slope` d logp / d hidden [N, d]; with `weights` the gradient
        [V, d] of sum(weights * logp) by the table.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        N, (V, d), wide, half = len(tokens), output.weight.shape, _wide(hidden), output.weight.dtype
        logp = hidden.new_empty(N, dtype=wide)
        found_entropy = torch.empty_like(logp) if entropy else None
        found_slope = hidden.new_empty(N, d) if slope else None
        to_table = hidden.new_zeros(V, d, dtype=wide) if weights is not None else None
        rows = max(1, BLOCK // V)
        for i in range(0, N, rows):
            c = min(rows, N - i)
            at = slice(i, i + c)
            h, token = (
                fill_rows(hidden[at].detach()),
                fill_rows(tokens[at, None]),
            )  # the rows filled in count for nothing
            z = output.logits(h)  # (c or a little more, V)
            output.correct(z, h, token)
            if tau != 1:
                z /= tau
            z = z.log_softmax(-1)
            logp[at] = z[:c].gather(-1, token[:c]).squeeze(-1)
            if entropy:
                found_entropy[at] = -(z[:c].exp() * z[:c]).sum(-1)
            if slope or weights is not None:
                # The derivative by z is (1 at the token, 0 elsewhere) - softmax; here with its sign turned.
                p = z.exp_().scatter_add_(-1, token, z.new_full(token.shape, -1.0)).to(half)
            if slope:
                found_slope[at] = product(p, output.weight.t())[:c] / -tau
            if weights is not None:
                scaled = h.to(wide) * (fill_rows(weights[at, None]) / tau)
                to_table -= product(p.t(), scaled.to(half).t())
        return logp, found_entropy, found_slope, to_table


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _like_table(gradient: Tensor, table: Tensor) -> Tensor:
    """The gradient [V, d] with rows of zeros for a table's padding."""
    padding = len(table) - len(gradient)
    return (F.pad(gradient, (0, 0, 0, padding)) if padding else gradient).to(table.dtype)
