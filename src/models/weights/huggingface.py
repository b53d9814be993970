"""GPT-2 weights from and to Hugging Face's form.

Hugging Face keeps GPT-2's projections as `Conv1D` with weights [in, out]; ours are `nn.Linear` with [out, in], hence
the transposes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from config.configs import GPTConfig
from config.user_error import UserError
from models.lora import merge_lora
from models.weights.adapter import Adapter, merge_adapter, read_adapter
from models.weights.checkpoint import WEIGHTS, build, check_finite, write_tensors
from models.weights.pretrained import ADAPTER_CONFIG, CONFIG, check_files
from utils.hub import LFS_POINTER, hub_folder, is_lfs_pointer
from utils.runs.folder import typed_path
from utils.tokenizer import Tokenizer, model_tokenizer
from utils.tokenizers.huggingface import has_tokenizer, quiet_transformers

if TYPE_CHECKING:
    from transformers import GPT2Config

Model = TypeVar("Model", bound=nn.Module)

_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_PLAIN = (
    "n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "layer_norm_epsilon", "activation_function",
    "tie_word_embeddings",
)  # fmt: skip
# Causal masks, which older versions of transformers wrote into every checkpoint.
_OLD_BUFFERS = (".attn.bias", ".attn.masked_bias")


def load_pretrained(
    cls: type[Model], name_or_path: str | Path, config: GPTConfig | None = None, vocab_size: int | None = None
) -> Model:
    """Build `cls` from a Hugging Face GPT-2: a hub name (`gpt2-medium`) or a folder. Sizes come from its config.json.

    Args:
        cls: GPT or one of its roles; a role's head is left at its random start.
        name_or_path: what `transformers` would be given.
        config: preset whose adapters, dropout and memory options are wanted.
        vocab_size: ids of the tokenizer; a token table with more rows is kept, its extra logits are never computed.

    Raises:
        UserError: not found (offline, say), damaged, not a GPT-2, or one with parts that this model does not have.
    """
    name = str(name_or_path)
    found = describe_pretrained(name)
    rows = found.config.vocab_size
    if vocab_size is not None and vocab_size > rows:
        raise UserError(
            f"-p {name}: its token table has {rows} rows, the tokenizer {vocab_size} ids; choose its own --tokenizer"
        )
    # The output projection is the token table; other heads (of a classifier, say) have no place here.
    state = {
        key: value.t().contiguous() if key.endswith(_TRANSPOSED) else value
        for key, value in _read(found).items()
        if key.startswith("transformer.")
    }
    sizes = found.sizes(vocab_size)
    wanted = sizes if config is None else sizes.with_options(config)
    return build(cls, wanted, state, f"-p {name}: is not a plain GPT-2", new_head=True, new_adapters=True)


@dataclass(frozen=True)
class Pretrained:
    """A Hugging Face GPT-2 that this project's model computes, before its weights are read.

    name: as it was given. source: the folder or hub name of the weights. config: its config.json. folder: where that
    lies. adapter: the LoRA adapter that `name` is, to be merged into the weights. note: what is to be told, or "".
    """

    name: str
    source: str
    config: GPT2Config
    folder: Path
    adapter: Adapter | None = None
    note: str = ""

    def sizes(self, vocab_size: int | None = None) -> GPTConfig:
        """Its sizes as this project has them, for a tokenizer of so many ids (None: as many as its table has rows)."""
        c = self.config
        return GPTConfig(
            name=self.name, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, block_size=c.n_positions,
            vocab_size=vocab_size or c.vocab_size, embedding_rows=c.vocab_size, layer_norm_eps=c.layer_norm_epsilon,
        )  # fmt: skip

    def tokenizer(self, flag: str, choose: str = "") -> tuple[Tokenizer, str]:
        """Its tokenizer, and a line on it or "": see `utils.tokenizer.model_tokenizer`."""
        own = self.adapter is not None and has_tokenizer(self.adapter.folder)
        model, folder = (self.name, self.adapter.folder) if own else (self.source, self.folder)
        return model_tokenizer(model, folder, self.config.vocab_size, flag, choose)


def describe_pretrained(name: str, cached_only: bool = False) -> Pretrained:
    """Find and check a model in Hugging Face's form by all but its weights.

    Args:
        name: a folder or a hub name; of a GPT-2, or of a LoRA adapter of one.
        cached_only: of the hub take only what was downloaded before.

    Raises:
        UserError: not found (offline, say), not a GPT-2, or one with parts that this model does not have.
    """
    local = typed_path(name)
    try:
        folder = local if local.exists() else hub_folder(name, cached_only=cached_only)
    except UserError as error:
        raise UserError(f"-p {error}") from None
    if not (folder / CONFIG).is_file() and (folder / ADAPTER_CONFIG).is_file():
        adapter = read_adapter(folder, name)
        try:
            base = describe_pretrained(adapter.base, cached_only)
        except UserError as error:
            raise UserError(f"-p {name}: is an adapter, and its base model cannot be read: {error}") from None
        notes = filter(None, (f"{name} is a LoRA adapter: merged into {base.source}", base.note))
        return replace(base, name=name, adapter=adapter, note="; ".join(notes))
    config = _config(name, folder)
    if local.exists():
        check_files(folder, lambda what: UserError(f"-p {name}: {what}"))
        _check_sizes(name, folder, config)
    kind = str((config.architectures or [""])[0])
    is_other = bool(kind) and not kind.endswith(("LMHeadModel", "GPT2Model"))
    note = f"{name} is a {kind}: its head is left out, and its trunk was trained for that head" if is_other else ""
    return Pretrained(name, str(folder) if local.exists() else name, config, folder, note=note)


def _config(name: str, folder: Path) -> GPT2Config:
    """config.json of a folder; UserError where it is not that of a GPT-2 that this project's model computes."""
    from transformers import AutoConfig  # transformers takes seconds to import and is needed only here

    if (folder / CONFIG).is_file() and is_lfs_pointer(folder / CONFIG):
        raise UserError(f"-p {name}: {CONFIG} {LFS_POINTER}")
    try:
        with quiet_transformers():
            # Said aloud: unsaid, transformers asks on the terminal whether to run the folder's Python files.
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
            if config.model_type != "gpt2":
                raise UserError(f"-p {name}: holds a {config.model_type} model; a GPT-2 is needed")
            _check_plain(name, config)
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds for sizes that are none
        raise _unreadable(name, error) from None
    return config


def _read(found: Pretrained) -> dict[str, Tensor]:
    """Tensors of a `GPT2LMHeadModel`, with the adapter merged in."""
    from transformers import GPT2Config, GPT2LMHeadModel

    name = found.name
    try:
        with quiet_transformers():
            # Without its other entries, which could name kernels or quantisers: code.
            plain = GPT2Config(**{size: getattr(found.config, size) for size in _PLAIN})
            model, report = GPT2LMHeadModel.from_pretrained(
                found.source, config=plain, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from None
    except (SafetensorError, UnpicklingError, RuntimeError):
        raise UserError(f"-p {name}: the weights are damaged or their shapes not those of its config.json") from None
    # transformers fills gaps with random numbers and leaves out what it does not know; both would go unnoticed.
    for what in ("missing_keys", "unexpected_keys"):
        keys = sorted(key for key in report[what] if key.startswith("transformer.") and not key.endswith(_OLD_BUFFERS))
        if keys:
            kind = what.partition("_")[0]
            raise UserError(f"-p {name}: the weights are not those of its config.json ({kind} {', '.join(keys[:3])})")
    if "lm_head.weight" in report["missing_keys"] and not plain.tie_word_embeddings:
        raise UserError(
            f'-p {name}: its config.json says "tie_word_embeddings": false, but its weights have no lm_head.weight; '
            "where the token table is the output projection, as in GPT-2, that should be true"
        )
    weights = model.state_dict()
    if not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
        raise UserError(f"-p {name}: has an output projection of its own; a GPT-2 with tied embeddings is needed")
    if found.adapter is not None:
        merge_adapter(weights, found.adapter, name)
    check_finite(weights, f"-p {name}: holds NaN or infinity")
    return weights


def _unreadable(name: str, error: Exception) -> UserError:
    """What is told of an error that transformers raised."""
    if "trust_remote_code" in str(error):
        return UserError(
            f"-p {name}: needs Python code of its own (auto_map), which is never run; a plain GPT-2 is needed"
        )
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if typed_path(name).exists():
        return UserError(f"-p {name}: cannot be read ({reason}); give a whole config.json and model.safetensors")
    remedy = "go online once, or give a folder"
    return UserError(f"-p {name}: cannot be loaded from Hugging Face ({reason}); {remedy}")


def _check_plain(name: str, source: GPT2Config) -> None:
    """Refuse the options of transformers' GPT-2 that change what it computes."""
    quantised = getattr(source, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method", "") if isinstance(quantised, dict) else quantised.quant_method
        raise UserError(
            f"-p {name}: its weights are quantised ({getattr(method, 'value', method) or 'by some method'}); give the "
            "model that it was made from"
        )
    empty = [size for size in _PLAIN[:5] if getattr(source, size) < 1]
    if empty:
        raise UserError(f"-p {name}: its config.json has {getattr(source, empty[0])} as {empty[0]}; copy it again")
    if source.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        raise UserError(f"-p {name}: activation {source.activation_function}; a GPT-2 with gelu_new is needed")
    if source.scale_attn_by_inverse_layer_idx or not source.scale_attn_weights:
        raise UserError(f"-p {name}: scales attention in another way than GPT-2; use a plain one")
    if source.n_inner not in (None, 4 * source.n_embd):
        raise UserError(f"-p {name}: feed-forward width {source.n_inner} is not 4 x {source.n_embd}; use a plain GPT-2")


def _check_sizes(name: str, folder: Path, source: GPT2Config) -> None:
    """Refuse a folder that holds less than a byte for each weight of its config.json: they would be allocated first."""
    width, rows = source.n_embd, source.vocab_size + source.n_positions
    files = [file for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern)]
    held = sum(file.stat().st_size for file in files if file.is_file())
    if files and held < width * (12 * width * source.n_layer + rows):
        raise UserError(f"-p {name}: the weights are damaged: {held} bytes are too few for its config.json")


def save_pretrained(
    model: nn.Module, folder: Path, eos_id: int | None = None, pad_id: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Write config.json and model.safetensors as transformers reads them: a language model as `GPT2LMHeadModel`, a
    reward model as `GPT2ForSequenceClassification` with one label.

    Adapters are merged in. Rows of the token table behind the vocabulary are left out, so that transformers cannot
    sample them either.

    Args:
        model: not a critic, whose values of every token have no place in this format.
        folder: made if it is not there.
        eos_id: defaults to the last id, where GPT-2's and the demo's vocabularies have it.
        pad_id: of padding; a reward model needs one that is not EOS, since it is read at the last token that is not
            padding. Where it is behind the vocabulary, a row of zeros is added for it.
        dtype: of the weights in the file.

    Raises:
        ValueError: the model is a critic, or a reward model without padding of its own.
        OSError: it cannot be written.
    """
    eos_id = model.config.vocab_size - 1 if eos_id is None else eos_id
    if model.role == "critic":
        raise ValueError("a critic cannot be saved in Hugging Face's form: its head would be lost")
    if model.role == "reward" and pad_id in (None, eos_id):
        raise ValueError("a reward model needs a padding id that is not EOS: its scores are read at the EOS")
    plain = merge_lora(model)
    config: GPTConfig = plain.config
    state = {
        key: value.detach().cpu().t() if key.endswith(_TRANSPOSED) else value.detach().cpu()
        for key, value in plain.state_dict().items()
    }
    table = state["transformer.wte.weight"][: config.vocab_size]
    description = _description(config) | {"bos_token_id": eos_id, "eos_token_id": eos_id}
    if pad_id is not None:
        description["pad_token_id"] = pad_id
    if model.role == "reward":
        table = torch.cat([table, table.new_zeros(max(0, pad_id + 1 - len(table)), table.shape[1])])
        state = _fold_head(state)
        description["architectures"] = ["GPT2ForSequenceClassification"]
        # Of a regression transformers' pipeline gives the score as it is, and not its sigmoid.
        description |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        description["problem_type"] = "regression"
    state["transformer.wte.weight"] = table
    description |= {"vocab_size": len(table), "dtype": str(dtype).removeprefix("torch.")}
    state = {key: value.to(dtype, copy=True).contiguous() for key, value in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(state, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")


def _description(config: GPTConfig) -> dict[str, Any]:
    """What config.json says of the sizes of a language model."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
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


def _fold_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scalar head, gain * (w . h + b) + bias, as a product alone: s . (h + shift).

    transformers' head has no bias. Nothing but the head reads the final LayerNorm's output h, so its bias takes the
    shift: along s, as long as makes up for the constant.
    """
    head = {key: value.double() for key, value in state.items() if key.startswith("head.")}
    score = head["head.norm_gain"] * head["head.weight"][0]
    constant = head["head.norm_gain"] * head["head.bias"][0] + head["head.norm_bias"]
    folded = {key: value for key, value in state.items() if not key.startswith("head.")}
    bias = folded["transformer.ln_f.bias"]
    folded["transformer.ln_f.bias"] = bias + constant * score / score.dot(score)
    folded["score.weight"] = score[None]
    return folded
