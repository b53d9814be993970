"""Folders of transformers as GGUF files, for llama.cpp and what is made of it: LLaMA and GPT-2.

See `models.weights.gguf` for the form, and for how it differs from Hugging Face's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from config.user_error import UserError
from models.weights.gguf import ROPE_FACTORS, gguf_names, llama3_factors, need_gguf, paired_heads, pairs_from_halves
from models.weights.gguf_tokenizer import write_tokenizer
from utils.runs.durable import WRITING, Disk
from utils.tokenizers.huggingface import quiet_transformers

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel

KINDS = ("f16", "q8_0")
"""How matrices are written: 16 bits a number, or blocks of 32 with 8 bits a number and one scale of 16. Vectors and
GPT-2's positions stay in fp32, and what has rows that are no whole blocks in f16, as llama.cpp's converter has them."""

_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # [in, out] in GPT-2
_MOST = 65504.0  # the largest number of fp16


@torch.no_grad()
def write_gguf(folder: Path, path: Path, kind: str) -> None:
    """Write a folder of a `LlamaForCausalLM` or `GPT2LMHeadModel` with its tokenizer as one file; `kind` of KINDS.

    A file of that name is replaced at the end; after an error it still stands.

    Raises:
        UserError: the folder, and what of it has no place in a GGUF file; or the gguf package is missing.
        OSError: it cannot be written.
    """
    need_gguf(str(path))
    from gguf import GGUFWriter

    fresh, disk = path.with_name(path.name + WRITING), Disk()
    try:
        model = _load(folder)
        writer = GGUFWriter(fresh, model.config.model_type)
        _describe(writer, model.config, kind)
        write_tokenizer(writer, folder, model.config.vocab_size, _stops(model))
        _add_tensors(writer, model, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        disk.sync(fresh)
        disk.rename(fresh, path)
        disk.sync(path.parent)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    finally:
        fresh.unlink(missing_ok=True)


def _load(folder: Path) -> PreTrainedModel:
    """The model of a folder, in the type of its file; UserError where it is none that has a place in a GGUF file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with quiet_transformers():
            options = {"local_files_only": True, "trust_remote_code": False}
            config = AutoConfig.from_pretrained(str(folder), **options)
            if config.model_type not in ("llama", "gpt2"):
                raise UserError(f"holds a {config.model_type} model; a GGUF file is written of LLaMA and GPT-2")
            other = [kind for kind in config.architectures or () if not kind.endswith(("ForCausalLM", "LMHeadModel"))]
            if other:
                raise UserError(f"holds a {other[0]}, whose head has no place in a GGUF file; give a language model")
            return AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", config=config, **options)
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds for a broken folder
        raise UserError(f"cannot be read ({' '.join(str(error).split())[:200]})") from None


def _describe(writer: GGUFWriter, config: PretrainedConfig, kind: str) -> None:
    """The sizes as metadata; UserError for what llama.cpp does not compute."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    file_types = {"f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}
    writer.add_file_type(file_types[kind])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    (_describe_llama if config.model_type == "llama" else _describe_gpt2)(writer, config)


def _describe_llama(writer: GGUFWriter, config: LlamaConfig) -> None:
    from gguf import RopeScalingType

    if config.hidden_act != "silu":
        raise UserError(f"has the activation {config.hidden_act}; llama.cpp's LLaMA has silu")
    rope = config.rope_parameters
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "llama3":
        factors = llama3_factors(rope["rope_theta"], config.head_dim, rope)
        writer.add_tensor(ROPE_FACTORS, factors)
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif rope["rope_type"] != "default":
        raise UserError(f"scales positions by the method {rope['rope_type']}; linear and llama3 are written")


def _describe_gpt2(writer: GGUFWriter, config: GPT2Config) -> None:
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        raise UserError(f"has the activation {config.activation_function}; llama.cpp's GPT-2 has gelu_new")
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        raise UserError("scales attention in another way than llama.cpp's GPT-2")
    writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _stops(model: PreTrainedModel) -> list[int]:
    """Every id that ends a text or a turn, as config.json and generation_config.json tell."""
    told = [config.eos_token_id for config in (model.config, model.generation_config)]
    return [i for ids in told if ids is not None for i in (ids if isinstance(ids, list) else [ids])]


def _add_tensors(writer: GGUFWriter, model: PreTrainedModel, kind: str) -> None:
    """Every tensor in its kind; a tied head is left out."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quantize

    config = model.config
    names = gguf_names(config.num_hidden_layers, config.model_type)
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType.Q8_0]
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = value.float().numpy()
        if config.model_type == "gpt2" and key.endswith(_CONV1D):
            values = values.T
        if config.model_type == "llama" and (heads := paired_heads(key, config)):
            values = pairs_from_halves(values, heads)
        name, of = names(key), GGMLQuantizationType.F32
        if values.ndim > 1 and name != "position_embd.weight":
            is_whole = kind == "q8_0" and values.shape[1] % block == 0
            of = GGMLQuantizationType.Q8_0 if is_whole else GGMLQuantizationType.F16
            if not np.abs(values).max() <= _MOST:
                raise UserError(f"{key} holds numbers beyond fp16's {_MOST:.0f}, or NaN; they have no place in {kind}")
        writer.add_tensor(name, quantize(np.ascontiguousarray(values), of), raw_dtype=of)
