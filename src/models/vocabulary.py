"""The projection onto the vocabulary: the largest matrix product of a small language model, and most of its memory.

Shapes: N positions, d channels, V vocabulary, c positions of one block.

`plain_token_logprobs` says what is computed; the rest of this page computes it in less memory. Log-probabilities of
chosen tokens need one row of V logits per position, and nothing of it afterwards. So the logits are made for a block of
positions at a time, forward and backward; all [N, V] of them never exist at once. (The idea is that of fused linear
cross-entropy, Hsu et al. 2024, "Liger Kernel"; theirs needs the loss to be a mean that is known in the forward pass. A
PPO loss is not, but the derivative of a token's log-probability by its hidden state is: it is kept, [N, d], and the
backward pass scales it.)

Under bf16 or fp16 autocast both factors are rounded to that type, with three precautions, because GPT-2's logits share
a large offset (some -30 to -100), where bf16 is spaced 0.25 to 0.5 apart, as much as PPO's clip range:

- the token table is centred over the vocabulary. That shifts all logits of a position by the same number, which no
  softmax sees, and takes the offset away before it meets a rounding;
- for PPO's log-probabilities the product is taken twice. The second pass starts from minus the rounded result of the
  first, inside the fp32 accumulator, and so returns what the rounding lost; their sum is good to about 16 bits. Two
  bf16 products are cheaper than one in fp32;
- elsewhere it is taken once. The sampler then takes those logits again in fp32 that stand high enough for the rounding
  to matter; the loss of fine-tuning is left with the rounding, which its many tokens average away.

What is left is the rounding of the factors, about 0.02 in the worst logit. Where a log-probability is wanted, the logit
of its token is taken once more in fp32, one dot product per position; the errors of the others partly cancel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels import decoding_linear, decoding_weight, fill_rows, product, product_dtype
from models.weight_copies import kept_with

BLOCK = 2**28
"""Bytes of the logits that exist at the same time: 1,335 positions of GPT-2's vocabulary, or twice as many where half
precision takes them once."""

SURE = 8.0
"""A logit up to here loses at most 1/64 when it is rounded to bf16."""


def plain_token_logprobs(
    hidden: Tensor, table: Tensor, vocab_size: int, tokens: Tensor, tau: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] of the tokens and entropies [N] of the tempered softmax, in nats: the definition.

    Arguments as in `token_logprobs`. With all [N, V] logits in memory and without any care for half precision; tests
    hold `token_logprobs`, `token_logprobs_and_entropy` and `token_loss_sum` to it.
    """
    logits = hidden @ table[:vocab_size].T  # (N, V)
    logp = torch.log_softmax(logits / tau, dim=-1)  # (N, V)
    entropy = -(logp.exp() * logp).sum(-1)  # (N,)
    return logp.gather(-1, tokens[:, None]).squeeze(-1), entropy


@dataclass
class OutputTable:
    """A token table [V, d] as the output projection uses it.

    weight: [V, d]; in half precision centred over the vocabulary.
    exact: the unrounded table [>= V, d] and its mean over the vocabulary [d]; None where `weight` is exact.
    """

    weight: Tensor
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
        weight = torch.empty_like(rows, dtype=dtype)
        for part, out in zip(rows.split(4096), weight.split(4096), strict=True):  # no copy of the whole table in fp32
            out.copy_(part - mean)
        return cls(weight, (rows, mean))

    def logits(self, hidden: Tensor) -> Tensor:
        """[c, V] in fp32 (fp64 stays fp64) from hidden states [c, d]; in half precision up to a constant per row."""
        first, rest = self.rounded(hidden.to(self.weight.dtype), twice=True)
        return first if rest is None else first.float().add_(rest)

    def rounded(
        self, hidden: Tensor, twice: bool, out: tuple[Tensor, Tensor | None] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The product [c, V] with hidden states [c, d] in the table's type and, if wanted, what its rounding lost.

        out: where half precision writes them, as `buffers` made it. In fp32 and fp64 nothing is lost that counts.
        """
        if self.exact is None:
            return product(hidden, self.weight), None
        first, rest = out or self.buffers(len(hidden), twice)
        torch.mm(hidden, self.weight.t(), out=first)
        return first, torch.addmm(first, hidden, self.weight.t(), beta=-1, out=rest) if twice else None

    def buffers(self, rows: int, twice: bool) -> tuple[Tensor, Tensor | None]:
        """Memory for `rounded`: that of one block serves the next, since fresh memory costs as much as the product."""
        shape = (rows, len(self.weight))
        return self.weight.new_empty(shape), self.weight.new_empty(shape) if twice else None

    def sampling_logits(self, hidden: Tensor) -> Tensor:
        """`logits` for a sampler: a decoding step's time is the reading of weights, so they are read once.

        Logits above `SURE` are taken in fp32 instead, which are few: it lies eight units above the mean of all.
        """
        if self.exact is None or hidden.device.type != "cpu":  # a GPU would have to say how many those are
            return self.logits(hidden)
        z = decoding_linear(hidden, decoding_weight(self.weight, self.weight.dtype)).float()
        at, token = (z > SURE).nonzero(as_tuple=True)
        if len(at) > 128 * len(z):
            return self.logits(hidden)
        rows, mean = self.exact
        z[at, token] = ((rows[token] - mean) * hidden[at].float()).sum(-1)
        return z

    def correct(self, logits: Tensor, hidden: Tensor, tokens: Tensor) -> None:
        """Put the fp32 product in place of the logit of each position's token [c, 1]."""
        if self.exact is not None:
            rows, mean = self.exact
            logits.scatter_(-1, tokens, ((rows[tokens.squeeze(-1)] - mean) * hidden.float()).sum(-1, keepdim=True))


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
    """Log-probability of each token under the tempered softmax, differentiable: `plain_token_logprobs` by blocks.

    Args:
        hidden: [N, d] final hidden states in which the tokens were chosen.
        table: the token table [>= V, d], tied to the output.
        tokens: [N] int64 in [0, V).
        tau: sampling temperature.

    Returns:
        [N] fp32, nats: `log_softmax(logits / tau)` at the tokens.
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
    forward pass, since every token counts alike. In half precision the logits but those of the tokens themselves keep
    the rounding of the product.
    """
    return _TokenLossSum.apply(hidden, table, vocab_size, tokens, product_dtype(hidden), torch.is_grad_enabled())


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
            to_table = _like_table(_sweep(hidden, output, tokens, ctx.tau, weights=grad)[3], ctx.table)
        return None if slope is None else grad[:, None].to(slope.dtype) * slope, to_table, None, None, None, None


class _TokenLossSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, table, vocab_size, tokens, dtype, grad_enabled):
        # An evaluation's table wants a gradient like any other: autograd does not tell here that nobody will ask.
        wants_hidden, wants_table = (wanted and grad_enabled for wanted in ctx.needs_input_grad[:2])
        output = OutputTable.of(table, vocab_size, dtype)
        weights = hidden.new_full(tokens.shape, -1.0, dtype=_wide(hidden)) if wants_table else None
        logp, _, slope, to_table = _sweep(hidden, output, tokens, 1.0, slope=wants_hidden, weights=weights, twice=False)
        ctx.save_for_backward(slope, to_table)
        ctx.table = table
        return -logp.sum()

    @staticmethod
    def backward(ctx, grad):
        slope, to_table = ctx.saved_tensors
        if to_table is not None:
            to_table = _like_table(to_table, ctx.table).mul_(grad)
        return None if slope is None else slope * -grad, to_table, None, None, None, None


def _sweep(
    hidden: Tensor, output: OutputTable, tokens: Tensor, tau: float, *,
    entropy: bool = False, slope: bool = False, weights: Tensor | None = None, twice: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """One pass over all positions, a block of logits at a time.

    Args:
        hidden: [N, d]. tokens: [N]. weights: [N] or None, what each log-probability counts for in a loss.
        twice: whether half precision takes the product twice.

    Returns:
        logp [N]; with `entropy` the entropy [N]; with `slope` d logp / d hidden [N, d]; with `weights` the gradient of
        sum(weights * logp) by the table, transposed [d, V].
    """
    with torch.autocast(hidden.device.type, enabled=False):
        N, wide, half = len(tokens), _wide(hidden), output.weight.dtype
        twice = twice and output.exact is not None
        logp = hidden.new_empty(N, dtype=wide)
        found_entropy = torch.empty_like(logp) if entropy else None
        found_slope = torch.empty_like(hidden) if slope else None
        to_table, memory = None, None
        # fp16 ends at 65,504. A frequent token's gradient, a sum over all its places, can pass that, and loss scaling
        # knows nothing of a sum that is made in the forward pass.
        shrink = 2.0**-8 if half == torch.float16 else 1.0
        for at in _blocks(N, output.weight, twice):
            # The rows filled in count for nothing.
            h, token = fill_rows(hidden[at].detach()), fill_rows(tokens[at, None])
            if memory is None and output.exact is not None:
                memory = output.buffers(len(h), twice)  # no later block is larger
            out = memory and tuple(x if x is None else x[: len(h)] for x in memory)
            z, rest = output.rounded(h.to(half), twice, out)  # (c or a little more, V)
            found, spread = _log_softmax(z, rest, h, token, output, tau, entropy, slope or weights is not None)
            c = len(logp[at])
            logp[at] = found[:c]
            if entropy:
                found_entropy[at] = spread[:c]
            if slope:  # z holds the derivative of logp by the logits now, with its sign turned
                found_slope[at] = product(z, output.weight.t())[:c] / -tau
            if weights is not None:
                scaled = h.to(wide) * (fill_rows(weights[at, None]) * (-shrink / tau))
                share = product(scaled.to(half).t(), z.t())
                to_table = share if to_table is None else to_table.to(wide).add_(share)
        if shrink != 1 and to_table is not None:
            to_table = to_table.to(wide).div_(shrink)
        return logp, found_entropy, found_slope, to_table


def _blocks(positions: int, weight: Tensor, twice: bool) -> Iterator[slice]:
    """Blocks of at most `BLOCK` bytes of logits, all but the last of one size."""
    most = max(1, BLOCK // (len(weight) * weight.element_size() * (2 if twice else 1)))
    count = math.ceil(positions / most)
    size = math.ceil(positions / max(1, count))
    yield from (slice(i, min(i + size, positions)) for i in range(0, positions, max(1, size)))


def _log_softmax(
    z: Tensor, rest: Tensor | None, hidden: Tensor, token: Tensor, output: OutputTable, tau: float,
    entropy: bool, slope: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probabilities [c] of the tokens [c, 1] and entropies [c], from logits z + rest [c, V], a slice at a time.

    z is memory to work in. With `slope` it ends as softmax - (1 at the token): minus d logp / d (logits / tau).
    """
    logp, found_entropy = (z.new_empty(len(z), dtype=_wide(z)) for _ in range(2))
    rows = max(1, slice_size(z.device.type) // z.shape[1])
    for i in range(0, len(z), rows):
        at = slice(i, i + rows)
        x = z[at].to(logp.dtype)  # in fp32 and fp64 this is z itself
        if rest is not None:
            x += rest[at]
        output.correct(x, hidden[at], token[at])
        if tau != 1:
            x /= tau
        x -= x.amax(-1, keepdim=True)
        chosen = x.gather(-1, token[at])
        e = exp_(x.clone() if entropy else x)
        total = e.sum(-1, keepdim=True)
        logp[at] = (chosen - total.log()).squeeze(-1)
        if entropy:
            found_entropy[at] = (total.log() - (e * x).sum(-1, keepdim=True) / total).squeeze(-1)
        if slope:
            z[at] = e.div_(total).scatter_add_(-1, token[at], -torch.ones_like(total))
    return logp, found_entropy


def exp_(x: Tensor) -> Tensor:
    """e to the x, in place; on a CPU torch's exp2 takes a quarter of the time of its exp."""
    return x.mul_(math.log2(math.e)).exp2_()


def slice_size(device: str) -> int:
    """Logits worked on at a time in fp32: as many as a CPU's cache holds, or as make a kernel worth its start."""
    return 2**20 if device == "cpu" else 2**24


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _like_table(transposed: Tensor, table: Tensor) -> Tensor:
    """A gradient [d, V] in the form of the table [>= V, d], with zeros for its padding."""
    V = transposed.shape[1]
    gradient = torch.empty_like(table)
    gradient[:V].copy_(transposed.t())
    gradient[V:].zero_()
    return gradient
