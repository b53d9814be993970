"""GPT-2 weights from and to Hugging Face's form.

Hugging Face keeps GPT-2's projections as `Conv1D` with weights [in, out]; ours are `nn.Linear` with [out, in], hence the transposes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from config.configs import GPTConfig
from config.user_error import UserError
from models.lora import is_adapter, merge_lora

Model = TypeVar("Model", bound=nn.Module)

_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def load_pretrained(
    cls: type[Model], name_or_path: str, config: GPTConfig | None = None, vocab_size: int | None = None
) -> Model:
    """Build `cls` from a Hugging Face GPT-2: a hub name (`gpt2-medium`) or a folder. Sizes come from its config.json.

    Args:
        cls: GPT or one of its roles; a role's head is left at its random start.
        name_or_path: what `transformers` would be given.
        config: preset whose adapters, dropout and memory options are wanted.
        vocab_size: ids of the tokenizer; a token table with more rows is kept, its extra logits are never computed.

    Raises:
        UserError: not found (offline, say), or not a GPT-2.
    """
    # transformers takes seconds to import and is needed only here.
    from transformers import AutoConfig, GPT2LMHeadModel

    try:
        source = AutoConfig.from_pretrained(name_or_path)
        if source.model_type != "gpt2":
            raise UserError(f"-p {name_or_path}: holds a {source.model_type} model; a GPT-2 is needed")
        weights = GPT2LMHeadModel.from_pretrained(name_or_path, dtype=torch.float32).state_dict()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"-p {name_or_path}: cannot be loaded from Hugging Face ({reason}); give a folder that holds config.json and model.safetensors, or go online once"
        ) from None
    if (
        source.activation_function not in ("gelu_new", "gelu_pytorch_tanh")
        or source.scale_attn_by_inverse_layer_idx
        or not source.scale_attn_weights
    ):
        raise UserError(
            f"-p {name_or_path}: a GPT-2 variant (activation {source.activation_function}) that this model does not compute; use a plain one"
        )
    if source.n_inner not in (None, 4 * source.n_embd):
        raise UserError(
            f"-p {name_or_path}: feed-forward width {source.n_inner} is not 4 x {source.n_embd}; use a plain GPT-2"
        )
    if vocab_size is not None and vocab_size > source.vocab_size:
        raise UserError(
            f"-p {name_or_path}: its token table has {source.vocab_size} rows, the tokenizer {vocab_size} ids; choose its own --tokenizer"
        )
    sizes = GPTConfig(
        name=name_or_path,
        n_layer=source.n_layer,
        n_head=source.n_head,
        n_embd=source.n_embd,
        block_size=source.n_positions,
        vocab_size=vocab_size or source.vocab_size,
        embedding_rows=source.vocab_size,
        layer_norm_eps=source.layer_norm_epsilon,
    )
    model = cls(sizes if config is None else sizes.with_options(config))
    own = model.state_dict()
    for key, value in own.items():
        if key.startswith("transformer.") and not is_adapter(key):
            theirs = weights[key]
            own[key] = theirs.t().contiguous() if key.endswith(_TRANSPOSED) else theirs
    model.load_state_dict(own)
    return model


def save_pretrained(model: nn.Module, folder: Path, eos_id: int | None = None) -> None:
    """Write config.json and model.safetensors as `transformers.GPT2LMHeadModel` reads them. Adapters are merged in first.

    `eos_id` defaults to the last id, where GPT-2's and the demo's vocabularies have it.
    """
    plain = merge_lora(model)
    config: GPTConfig = plain.config
    state = {}
    for key, value in plain.state_dict().items():
        if key.startswith("transformer."):
            value = value.t() if key.endswith(_TRANSPOSED) else value
            state[key] = value.detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    description = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_positions": config.block_size,
        "vocab_size": config.embedding_rows,
        "layer_norm_epsilon": config.layer_norm_eps,
        "initializer_range": config.init_std,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "bos_token_id": config.vocab_size - 1 if eos_id is None else eos_id,
        "eos_token_id": config.vocab_size - 1 if eos_id is None else eos_id,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")
