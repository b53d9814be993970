"""LLaMA in Hugging Face's form: the names of tensors are our own, but for the output projection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from config.model_configs import LlamaConfig
from models.weights.form import HuggingFaceForm, split_head

if TYPE_CHECKING:
    from transformers import LlamaConfig as TheirConfig

_ROPE = {"factor": "rope_factor", "low_freq_factor": "rope_low_freq_factor"} | {
    "high_freq_factor": "rope_high_freq_factor", "original_max_position_embeddings": "rope_original_context"
}  # fmt: skip
_THEIR_OUTPUT = "lm_head.weight"
_OF_TYPE = {"default": (), "linear": ("factor",), "llama3": tuple(_ROPE)}


class LlamaForm(HuggingFaceForm):
    """See `HuggingFaceForm`."""

    family, model_type, what = "llama", "llama", "a LLaMA"
    trunk, table, output = "model.", "model.embed_tokens.weight", "output.weight"
    classes = {"lm": "LlamaForCausalLM", "reward": "LlamaForSequenceClassification"}
    bare = "LlamaModel"
    needed = (
        "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size",
        "intermediate_size", "max_position_embeddings", "vocab_size", "rms_norm_eps", "hidden_act", "attention_bias",
        "mlp_bias", "rope_parameters", "tie_word_embeddings",
    )  # fmt: skip
    projections = r"layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
    old_buffers = ("rotary_emb.inv_freq",)

    def check(self, config: TheirConfig) -> str:
        """See `HuggingFaceForm.check`."""
        if config.hidden_act not in ("silu", "swish"):
            return f"activation {config.hidden_act}; a LLaMA with silu is needed"
        rope = _rope(config)
        kind = rope.get("rope_type", "default")
        if kind not in _OF_TYPE:
            return f"rotations are stretched by {kind!r}; a LLaMA with one of {', '.join(_OF_TYPE)} is needed"
        if missing := [entry for entry in _OF_TYPE[kind] if not isinstance(rope.get(entry), int | float)]:
            return f"rotations of type {kind} need {', '.join(missing)} in its config.json; copy it again"
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            return "rotates a part of each head's channels only; a plain LLaMA is needed"
        return ""

    def least_numbers(self, config: TheirConfig) -> int:
        """See `HuggingFaceForm.least_numbers`."""
        width, head = config.hidden_size, config.head_dim
        attention = 2 * width * head * (config.num_attention_heads + config.num_key_value_heads)
        block = attention + 3 * width * config.intermediate_size
        return config.num_hidden_layers * block + config.vocab_size * width * (1 if config.tie_word_embeddings else 2)

    def sizes(self, config: TheirConfig, name: str, vocab_size: int) -> LlamaConfig:
        """See `HuggingFaceForm.sizes`."""
        c, rope = config, _rope(config)
        kind = rope.get("rope_type", "default")
        return LlamaConfig(
            name=name, n_layer=c.num_hidden_layers, n_head=c.num_attention_heads, n_kv_head=c.num_key_value_heads,
            head_dim=c.head_dim, n_embd=c.hidden_size, n_inner=c.intermediate_size,
            block_size=c.max_position_embeddings, vocab_size=vocab_size, embedding_rows=c.vocab_size,
            tied=c.tie_word_embeddings, attention_bias=c.attention_bias, mlp_bias=c.mlp_bias,
            rms_norm_eps=c.rms_norm_eps, rope_theta=float(rope["rope_theta"]), rope_type=kind,
            **{_ROPE[entry]: type(getattr(LlamaConfig, _ROPE[entry]))(rope[entry]) for entry in _OF_TYPE[kind]},
        )  # fmt: skip

    def description(self, config: LlamaConfig) -> dict[str, Any]:
        """See `HuggingFaceForm.description`."""
        rope = {"rope_type": config.rope_type, "rope_theta": config.rope_theta}
        return {
            "hidden_act": "silu",
            "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head,
            "num_key_value_heads": config.n_kv_head,
            "head_dim": config.head_dim,
            "hidden_size": config.n_embd,
            "intermediate_size": config.n_inner,
            "max_position_embeddings": config.block_size,
            "rms_norm_eps": config.rms_norm_eps,
            "initializer_range": config.init_std,
            "attention_bias": config.attention_bias,
            "mlp_bias": config.mlp_bias,
            "rope_parameters": rope | {entry: getattr(config, _ROPE[entry]) for entry in _OF_TYPE[config.rope_type]},
            # Also where transformers 4 and others look for it.
            "rope_theta": config.rope_theta,
            "tie_word_embeddings": config.tied,
        }

    def ours(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `HuggingFaceForm.ours`."""
        return {self.output if key == _THEIR_OUTPUT else key: value for key, value in state.items()}

    def theirs(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `HuggingFaceForm.theirs`."""
        return {_THEIR_OUTPUT if key == self.output else key: value for key, value in state.items()}

    def fold_head(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        """See `HuggingFaceForm.fold_head`. RMSNorm has no bias to put the constant into."""
        folded, score, constant = split_head(state)
        folded["score.weight"] = score[None]
        return folded, constant


def _rope(config: TheirConfig) -> dict[str, Any]:
    """transformers 5 keeps all of it in `rope_parameters`, and fills that from the older entries."""
    rope = dict(config.rope_parameters or {})
    return {"rope_type": rope.pop("type", "default"), "rope_theta": 10000.0} | rope
