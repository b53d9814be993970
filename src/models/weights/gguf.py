"""LLaMA models in GGUF files, llama.cpp's form, read as Hugging Face has them.

A GGUF file holds everything in one: sizes and tokenizer as metadata, and the tensors, mostly quantised. Rows of the q
and k projections are in another order there: llama.cpp rotates the pairs (2i, 2i + 1) of a head's channels, Hugging
Face the pairs (i, i + hd/2). The gguf package reads the container and knows how numbers are quantised.

Shapes: H heads or key/value heads, hd channels of a head, d hidden size.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from config.user_error import UserError
from models.weights.checkpoint import WEIGHTS, check_finite, write_tensors
from models.weights.gguf_tokenizer import read_tokenizer
from utils.hub import LFS_POINTER, is_lfs_pointer

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import LlamaConfig, PreTrainedTokenizerFast

GGUF_PACKAGE = "gguf==0.19.0"

ROPE_FACTORS = "rope_freqs.weight"
# Sizes that change what is computed, which transformers' LLaMA does not have.
_OTHER_SIZES = (
    "expert_count", "attention.scale", "attention.clamp_kqv", "attention.sliding_window", "logit_scale",
    "residual_scale", "embedding_scale", "rope.scaling.attn_factor",
)  # fmt: skip
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read_gguf(path: Path) -> Gguf:
    """Open a GGUF file and check it by all but its numbers.

    Raises:
        UserError: the path and why it is not read: no GGUF file, damaged, not a LLaMA, or one with parts that
            transformers' LlamaForCausalLM does not have; or the gguf package is missing.
    """
    need_gguf(str(path))
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """One that tells where the file ends: by itself it reads on, for as long as a damaged number says."""

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: str | None = None) -> np.ndarray:
            values = super()._get(offset, dtype, count, override_order)
            if len(values) < count:
                raise ValueError(f"nothing at byte {offset + values.nbytes}")
            return values

    try:
        if is_lfs_pointer(path):
            raise UserError(f"{path}: {LFS_POINTER}")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{path}: is no GGUF file; copy it again")
        reader = Reader(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UserError:
        raise
    except Exception as error:  # the reader trusts the file: any number in it can lead anywhere
        raise _damaged(path, error) from None
    return Gguf(path, reader)


def need_gguf(what: str) -> None:
    """UserError, which starts with `what`, where the gguf package is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{what}: GGUF files take the gguf package; pip install {GGUF_PACKAGE}")


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return UserError(f"{path}: is damaged or cut short ({reason}); copy it again")


@dataclass(frozen=True)
class Gguf:
    """A LLaMA in a GGUF file, as `read_gguf` opens it. Every UserError of it starts with the file's path."""

    path: Path
    reader: GGUFReader

    def __post_init__(self) -> None:
        try:
            self._check()
            _ = self.config
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        except Exception as error:  # metadata of any type under any name
            raise _damaged(self.path, error) from None

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Every key of the file with its value."""
        return {key: field.contents() for key, field in self.reader.fields.items()}

    @cached_property
    def config(self) -> LlamaConfig:
        """Its sizes, rope scaling and special ids."""
        from transformers import LlamaConfig

        get = self._size
        width, heads = get("embedding_length"), get("attention.head_count")
        head_dim = get("attention.key_length", width // heads)
        if (get("attention.value_length", head_dim), get("rope.dimension_count", head_dim)) != (head_dim, head_dim):
            raise UserError("has heads of several sizes, or turned in part; LlamaForCausalLM has not")
        ids = {role: self.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "padding")}
        return LlamaConfig(
            architectures=["LlamaForCausalLM"], vocab_size=self._shapes["token_embd.weight"][0], hidden_size=width,
            intermediate_size=get("feed_forward_length"), num_hidden_layers=get("block_count"),
            num_attention_heads=heads, num_key_value_heads=get("attention.head_count_kv", heads), head_dim=head_dim,
            max_position_embeddings=get("context_length"), rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
            rope_parameters=self._rope(head_dim), tie_word_embeddings="output.weight" not in self._shapes,
            attention_bias="blk.0.attn_q.bias" in self._shapes, mlp_bias="blk.0.ffn_up.bias" in self._shapes,
            bos_token_id=ids["bos"], eos_token_id=self._eos(), pad_token_id=ids["padding"],
        )  # fmt: skip

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Its tokenizer, with the chat template where the file has one."""
        try:
            return read_tokenizer(self.metadata, self.config.vocab_size, self.config.max_position_embeddings)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        except Exception as error:  # the tokenizers library raises plain Exception
            raise _damaged(self.path, error) from None

    def state(self) -> dict[str, Tensor]:
        """The state dict of its `LlamaForCausalLM`, fp32; a tied head is left out."""
        from gguf import dequantize

        state, wanted = {}, self._wanted
        for tensor in self.reader.tensors:
            if tensor.name == ROPE_FACTORS:
                continue
            key, shape = wanted[tensor.name]
            try:
                values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
            except NotImplementedError:
                kind = tensor.tensor_type.name
                raise UserError(f"{self.path}: {tensor.name} is quantised as {kind}, which is not read") from None
            except ValueError as error:
                raise _damaged(self.path, error) from None
            if heads := paired_heads(key, self.config):
                values = halves_from_pairs(values, heads)
            state[key] = torch.from_numpy(np.array(values, np.float32))  # a copy: the file may go
        check_finite(state, f"{self.path}: holds NaN or infinity")
        return state

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Write it as transformers reads it: config.json, generation_config.json, model.safetensors with weights of
        `dtype`, and the tokenizer, if `folder` is there; OSError where it cannot be written."""
        write_tensors({key: value.to(dtype) for key, value in self.state().items()}, folder / WEIGHTS)
        self.save_tokenizer(folder)
        config = copy.deepcopy(self.config)
        config.dtype = str(dtype).removeprefix("torch.")
        config.save_pretrained(folder)

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer and the ids that end an answer, as transformers reads them."""
        from transformers import GenerationConfig

        GenerationConfig.from_model_config(self.config).save_pretrained(folder)
        tokenizer = self.tokenizer()
        tokenizer.save_pretrained(folder, save_jinja_files=False)
        # The class that takes tokenizer.json as it is, by the name that older versions of transformers know too.
        file = folder / "tokenizer_config.json"
        described = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        file.write_text(json.dumps(described, indent=2) + "\n")

    def _check(self) -> None:
        """Refuse what is no LLaMA in one whole file, and tensors that it should not have or lacks."""
        kind = self.metadata.get("general.architecture")
        if kind != "llama":
            raise UserError(f"holds a model of the architecture {kind}; one of llama is needed")
        if self.metadata.get("split.count", 0) > 1:
            raise UserError("is one of several parts; put them together with llama.cpp's llama-gguf-split --merge")
        if self.reader.byte_order != "I":
            raise UserError("was written for a machine of another byte order; convert it with gguf-convert-endian")
        for size in _OTHER_SIZES:
            if self.metadata.get(f"llama.{size}"):
                raise UserError(f"has llama.{size}, which LlamaForCausalLM does not know; a plain LLaMA is needed")
        wanted = {name: shape for name, (_, shape) in self._wanted.items()}
        other = sorted(set(self._shapes) - set(wanted) - {ROPE_FACTORS})
        if other:
            raise UserError(f"has tensors that a plain LLaMA has not: {', '.join(other[:3])}")
        wrong = next((name for name, shape in wanted.items() if self._shapes.get(name) != shape), None)
        if wrong:
            there = f"has the shape {self._shapes[wrong]}" if wrong in self._shapes else "is missing"
            raise UserError(f"is damaged: the tensor {wrong} {there}, its sizes ask for {wanted[wrong]}")

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in self.reader.tensors}

    @cached_property
    def _wanted(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """GGUF's name of every tensor -> Hugging Face's, and the shape that it has by the sizes."""
        from transformers import LlamaForCausalLM

        # Before a model of as many layers is described: a damaged number may be billions.
        if f"blk.{self.config.num_hidden_layers - 1}.attn_norm.weight" not in self._shapes:
            raise UserError(f"is damaged: has no tensors of {self.config.num_hidden_layers} layers; copy it again")
        with torch.device("meta"):
            shapes = {key: tuple(value.shape) for key, value in LlamaForCausalLM(self.config).state_dict().items()}
        if self.config.tie_word_embeddings:
            del shapes["lm_head.weight"]
        names = gguf_names(self.config.num_hidden_layers)
        return {names(key): (key, shape) for key, shape in shapes.items()}

    def _size(self, name: str, default: int | None = None) -> Any:
        """One of the architecture's metadata; UserError where it is not a positive number."""
        value = self.metadata.get(f"llama.{name}", default)
        if not isinstance(value, int | float) or value <= 0:
            raise UserError(f"has {'no' if value is None else value} llama.{name}; a plain LLaMA's number is needed")
        # Stored in fp32: 1e-5 comes back as 9.999999747e-06, which is no other number there.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def _eos(self) -> int | list[int] | None:
        """Every id that ends a text or a turn; one alone as transformers writes one."""
        ids = [self.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
        ids = list(dict.fromkeys(i for i in ids if i is not None))
        return ids if len(ids) > 1 else next(iter(ids), None)

    def _rope(self, head_dim: int) -> dict[str, Any]:
        """transformers' rope_parameters; UserError for a scaling that is not known here."""
        rope = {"rope_theta": self._size("rope.freq_base", 10000.0), "rope_type": "default"}
        get = self.metadata.get
        factors = next((tensor.data for tensor in self.reader.tensors if tensor.name == ROPE_FACTORS), None)
        kind = get("llama.rope.scaling.type", "none")
        factor = get("llama.rope.scaling.factor") or get("llama.rope.scale_linear") or 1.0
        if factors is not None:
            # llama.cpp keeps what Llama 3's scaling comes to, and not its settings; all of Llama 3 have the same.
            original = get("llama.rope.scaling.original_context_length", 8192)
            scaling = {"factor": float(factors.max()), "original_max_position_embeddings": original, **_LLAMA3}
            known = llama3_factors(rope["rope_theta"], head_dim, scaling)
            if factors.shape != known.shape or not np.allclose(factors, known, rtol=1e-4):
                raise UserError(f"scales positions by a {ROPE_FACTORS} that is not Llama 3's")
            return rope | scaling | {"rope_type": "llama3"}
        if kind == "linear" or (kind == "none" and factor != 1.0):
            return rope | {"rope_type": "linear", "factor": float(factor)}
        if kind != "none":
            raise UserError(f"scales positions by the method {kind}; linear and Llama 3's are known here")
        return rope


def gguf_names(n_layer: int, kind: str = "llama") -> Callable[[str], str]:
    """What gives GGUF's name for Hugging Face's of a tensor of LLaMA or GPT-2."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH[kind.upper()], n_layer)
    return partial(names.get_name, try_suffixes=(".weight", ".bias"))


def halves_from_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection [H * hd, d], or its bias, from GGUF's order to Hugging Face's."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def paired_heads(key: str, config: LlamaConfig) -> int:
    """How many heads a tensor, by Hugging Face's name, has in GGUF's order of rows; 0 where the order is the same."""
    found = re.search(r"\.([qk])_proj\.", key)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    return heads[found[1]] if found else 0


def pairs_from_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """The other way round."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def llama3_factors(theta: float, head_dim: int, scaling: dict[str, float]) -> np.ndarray:
    """By how much Llama 3's scaling divides each frequency [hd / 2], fp32; transformers, `_compute_llama3_parameters`.

    Short waves stay, long ones are divided by the factor, those between by something between.
    """
    waves = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((scaling["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - kept) / scaling["factor"] + kept)).astype(np.float32)
