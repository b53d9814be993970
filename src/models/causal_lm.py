"""What a language model offers whatever its family: hidden states, logits, log-probabilities, loss, sampling, folders.

A family (`models.gpt`) says what its trunk computes, how it starts, how it decodes, and how it is read from other
forms. Roles are put before a family's class: `models.roles`.

Shapes: B rows, L tokens of a row, N chosen columns, d channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from torch import Tensor, nn

from config.model_configs import ModelConfig
from models import lora, vocabulary
from models.cache import KVCache
from models.decoding import Decoder
from models.generation import Generation, generate
from models.kernels import check_plain
from models.weights import checkpoint, huggingface


class CausalLM(nn.Module):
    """A language model.

    A family gives:
        family: its name, as in its config. trunk_name: the attribute that holds its trunk. only_for_language: tensors
            that critics and reward models do not have.
        trunk: all but a head; `trunk(ids, att, cache, right_padded, at)` takes and returns what `hidden` does.
        token_table: [>= V, d]; rows from V on are padding. output_table: likewise, of the projection onto the
            vocabulary; the same where the two are tied, which they are unless the family says otherwise.
        blocks: the transformer blocks. final_norm: the norm behind the last of them.
        decoder: makes steps of one token per row behind what a cache holds.
    """

    role = "lm"
    family: str
    trunk_name: str
    only_for_language: tuple[str, ...] = ()
    token_table: nn.Parameter
    blocks: nn.ModuleList
    final_norm: nn.Module
    decoder: Callable[[KVCache], Decoder]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check_plain()
        self.config = config

    @property
    def trunk(self) -> nn.Module:
        """All but a head."""
        return getattr(self, self.trunk_name)

    def take_trunk(self, trunk: nn.Module) -> None:
        """Put this model's head on another's trunk, which both then have."""
        setattr(self, self.trunk_name, trunk)
        self.config = trunk.config

    def set_options(self, config: ModelConfig) -> None:
        """Go on with other options, such as `activation_checkpointing`."""
        self.config = self.trunk.config = config

    @property
    def output_table(self) -> nn.Parameter:
        """[>= V, d], what hidden states are projected onto the vocabulary with."""
        return self.token_table

    def hidden(
        self, ids: Tensor, att: Tensor | None = None, cache: KVCache | None = None, right_padded: bool = False,
        at: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Final hidden states.

        Args:
            ids: [B, L] int64; anything may stand where att is false.
            att: [B, L] bool (or 0 and 1), true on real tokens; None when all are. Padding may be on either side.
            cache: keys and values of the tokens before these; this call's are appended.
            right_padded: promise that every row starts at column 0, as compact rows do (`utils.data.batching`), which
                saves building a mask (with a cache as long as that is empty).
            at: [N] int64 indices into the B * L flattened columns; the last block's second half and the final LayerNorm
                are computed only there.

        Returns:
            [B, L, d], or [N, d] with `at`; the states at padding are meaningless but finite.

        Raises:
            ValueError: more tokens than the context holds.
        """
        return self.trunk(ids, att, cache, right_padded, at)

    def lm_head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] in fp32 of states [..., d]; in half precision up to a constant each: `models.vocabulary`."""
        return vocabulary.logits(hidden, self.output_table, self.config.vocab_size)

    def token_logprobs(self, hidden: Tensor, tokens: Tensor, tau: float = 1.0) -> Tensor:
        """Log-probabilities [N] of tokens [N] chosen in states [N, d]. See `models.vocabulary.token_logprobs`."""
        return vocabulary.token_logprobs(hidden, self.output_table, self.config.vocab_size, tokens, tau)

    def token_logprobs_and_entropy(self, hidden: Tensor, tokens: Tensor, tau: float = 1.0) -> tuple[Tensor, Tensor]:
        """`token_logprobs` and the entropy [N] of each distribution, without gradients."""
        return vocabulary.token_logprobs_and_entropy(hidden, self.output_table, self.config.vocab_size, tokens, tau)

    def token_loss_sum(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Sum of the cross-entropies of tokens [N] after states [N, d], in nats."""
        return vocabulary.token_loss_sum(hidden, self.output_table, self.config.vocab_size, tokens)

    def forward(
        self, ids: Tensor, att: Tensor | None = None, right_padded: bool = False, at: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits in fp32; those of column j predict column j + 1. With `targets` the loss of predicting these.

        Args:
            ids, att, right_padded, at: see `hidden`; to project only the columns `at` saves most of a loss's memory.
            targets: [N] int64, the tokens behind the columns `at`. (A prepared module is called through its forward
                pass, where precision and ranks are dealt with; so the loss of supervised fine-tuning is made here.)

        Returns:
            [B, L, V], or [N, V] with `at`; with `targets` the sum of their cross-entropies in nats [].
        """
        h = self.hidden(ids, att, right_padded=right_padded, at=at)
        return self.lm_head(h) if targets is None else self.token_loss_sum(h, targets)

    def generate(self, prompt: Tensor, max_new_tokens: int, eos_id: int | Sequence[int], **sampling) -> Tensor:
        """Continue one prompt [P] of token ids; returns the new ids [n], EOS included. See `batch_generate`."""
        return self.batch_generate([prompt], max_new_tokens, eos_id, **sampling).row(0)

    def batch_generate(self, prompts: list, max_new_tokens: int, eos_id: int | Sequence[int], **sampling) -> Generation:
        """Continue prompts of mixed length. See `models.generation.generate`."""
        return generate(self, prompts, max_new_tokens=max_new_tokens, eos_id=eos_id, **sampling)

    def freeze_weights(self, method: str) -> None:
        """Choose what trains: "lora", "last_block" or "none"; heads always do. See `models.lora.freeze_weights`."""
        lora.freeze_weights(self, method)

    @classmethod
    def from_checkpoint(cls, folder: str | Path, config: ModelConfig | None = None, adapters: str = "keep") -> Self:
        """Load one of our checkpoint folders into this role. See `models.weights.checkpoint.load_model`."""
        return checkpoint.load_model(cls, Path(folder), config, adapters)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, config: ModelConfig | None = None, vocab_size: int | None = None
    ) -> Self:
        """Load weights in Hugging Face's form. See `models.weights.huggingface.load_pretrained`."""
        return huggingface.load_pretrained(cls, name_or_path, config, vocab_size)

    def save_pretrained(self, folder: str | Path, eos_id: int | None = None, **options) -> None:
        """Write a folder that `transformers` loads. See `models.weights.huggingface.save_pretrained`."""
        huggingface.save_pretrained(self, Path(folder), eos_id, **options)
