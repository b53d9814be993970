"""GPT-2 in Hugging Face's form.

Hugging Face keeps GPT-2's projections as `Conv1D` with weights [in, out]; ours are `nn.Linear` with [out, in], hence
the transposes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from config.model_configs import GPTConfig
from models.weights.form import HuggingFaceForm, split_head

if TYPE_CHECKING:
    from transformers import GPT2Config

_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


class GPT2Form(HuggingFaceForm):
    """See `HuggingFaceForm`."""

    family, model_type, what = "gpt2", "gpt2", "a GPT-2"
    trunk, table, output = "transformer.", "transformer.wte.weight", ""
    classes = {"lm": "GPT2LMHeadModel", "reward": "GPT2ForSequenceClassification"}
    bare = "GPT2Model"
    needed = (
        "n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "layer_norm_epsilon", "activation_function",
        "tie_word_embeddings",
    )  # fmt: skip
    projections = r"h\.\d+\.(?:attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)"
    # Causal masks, which older versions of transformers wrote into every checkpoint.
    old_buffers = (".attn.bias", ".attn.masked_bias")

    def check(self, config: GPT2Config) -> str:
        """See `HuggingFaceForm.check`."""
        if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
            return f"activation {config.activation_function}; a GPT-2 with gelu_new is needed"
        if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
            return "scales attention in another way than GPT-2; use a plain one"
        if config.n_inner not in (None, 4 * config.n_embd):
            return f"feed-forward width {config.n_inner} is not 4 x {config.n_embd}; use a plain GPT-2"
        return ""

    def least_numbers(self, config: GPT2Config) -> int:
        """See `HuggingFaceForm.least_numbers`."""
        width, rows = config.n_embd, config.vocab_size + config.n_positions
        return width * (12 * width * config.n_layer + rows)

    def sizes(self, config: GPT2Config, name: str, vocab_size: int) -> GPTConfig:
        """See `HuggingFaceForm.sizes`."""
        c = config
        return GPTConfig(
            name=name, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, block_size=c.n_positions,
            vocab_size=vocab_size, embedding_rows=c.vocab_size, layer_norm_eps=c.layer_norm_epsilon,
        )  # fmt: skip

    def description(self, config: GPTConfig) -> dict[str, Any]:
        """See `HuggingFaceForm.description`."""
        return {
            "activation_function": "gelu_new",
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "n_positions": config.block_size,
            "layer_norm_epsilon": config.layer_norm_eps,
            "initializer_range": config.init_std,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
            "resid_pdrop": config.dropout,
            "tie_word_embeddings": True,
        }

    def ours(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `HuggingFaceForm.ours`. The output projection is the token table."""
        return _turned({key: value for key, value in state.items() if key.startswith(self.trunk)})

    def theirs(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `HuggingFaceForm.theirs`."""
        return _turned(state)

    def fold_head(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        """See `HuggingFaceForm.fold_head`: score s . (h + shift), so that nothing is left out.

        transformers' head has no bias. Nothing but the head reads the final LayerNorm's output h, so its bias takes the
        shift: along s, as long as makes up for the constant.
        """
        folded, score, constant = split_head(state)
        bias = folded["transformer.ln_f.bias"]
        folded["transformer.ln_f.bias"] = bias + constant * score / score.dot(score)
        folded["score.weight"] = score[None]
        return folded, 0.0


def _turned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.t().contiguous() if key.endswith(_TRANSPOSED) else value for key, value in state.items()}
