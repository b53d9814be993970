"""GPT-2 weights from and to Hugging Face's form.

Hugging Face keeps GPT-2's projections as `Conv1D` with weights [in, out]; ours are `nn.Linear` with [out, in], hence
the transposes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from config.configs import GPTConfig
from config.user_error import UserError
from models.lora import merge_lora
from models.weights.checkpoint import build, check_finite

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
    source, weights = _read(name)
    if vocab_size is not None and vocab_size > source.vocab_size:
        raise UserError(
            f"-p {name}: its token table has {source.vocab_size} rows, the tokenizer {vocab_size} ids; "
            "choose its own --tokenizer"
        )
    sizes = GPTConfig(
        name=name,
        n_layer=source.n_layer,
        n_head=source.n_head,
        n_embd=source.n_embd,
        block_size=source.n_positions,
        vocab_size=vocab_size or source.vocab_size,
        embedding_rows=source.vocab_size,
        layer_norm_eps=source.layer_norm_epsilon,
    )
    # The output projection is the token table; other heads (of a classifier, say) have no place here.
    state = {
        key: value.t().contiguous() if key.endswith(_TRANSPOSED) else value
        for key, value in weights.items()
        if key.startswith("transformer.")
    }
    wanted = sizes if config is None else sizes.with_options(config)
    return build(cls, wanted, state, f"-p {name}: is not a plain GPT-2", new_head=True, new_adapters=True)


def _read(name: str) -> tuple[GPT2Config, dict[str, Tensor]]:
    """Config and tensors of a Hugging Face GPT-2 that this project's model computes."""
    # transformers takes seconds to import and is needed only here.
    from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

    remedy = "give a folder that holds config.json and model.safetensors, or go online once"
    try:
        with _quiet_transformers():
            # Said aloud: unsaid, transformers asks on the terminal whether to run the folder's Python files.
            source = AutoConfig.from_pretrained(name, trust_remote_code=False)
            if source.model_type != "gpt2":
                raise UserError(f"-p {name}: holds a {source.model_type} model; a GPT-2 is needed")
            _check_plain(name, source)
            _check_sizes(name, source)
            # Without its other entries, which could name kernels or quantisers: code.
            plain = GPT2Config(**{size: getattr(source, size) for size in _PLAIN})
            model, report = GPT2LMHeadModel.from_pretrained(
                name, config=plain, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"-p {name}: needs Python code of its own (auto_map), which is never run; a plain GPT-2 is needed"
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"-p {name}: cannot be loaded from Hugging Face ({reason}); {remedy}") from None
    except (SafetensorError, UnpicklingError, RuntimeError):
        raise UserError(f"-p {name}: the weights are damaged or their shapes not those of its config.json") from None
    # transformers fills gaps with random numbers and leaves out what it does not know; both would go unnoticed.
    for what in ("missing_keys", "unexpected_keys"):
        keys = sorted(key for key in report[what] if key.startswith("transformer.") and not key.endswith(_OLD_BUFFERS))
        if keys:
            kind = what.partition("_")[0]
            raise UserError(f"-p {name}: the weights are not those of its config.json ({kind} {', '.join(keys[:3])})")
    weights = model.state_dict()
    if not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
        raise UserError(f"-p {name}: has an output projection of its own; a GPT-2 with tied embeddings is needed")
    check_finite(weights, f"-p {name}: holds NaN or infinity")
    return source, weights


def _check_plain(name: str, source: GPT2Config) -> None:
    """Refuse the options of transformers' GPT-2 that change what it computes."""
    if source.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        raise UserError(f"-p {name}: activation {source.activation_function}; a GPT-2 with gelu_new is needed")
    if source.scale_attn_by_inverse_layer_idx or not source.scale_attn_weights:
        raise UserError(f"-p {name}: scales attention in another way than GPT-2; use a plain one")
    if source.n_inner not in (None, 4 * source.n_embd):
        raise UserError(f"-p {name}: feed-forward width {source.n_inner} is not 4 x {source.n_embd}; use a plain GPT-2")


def _check_sizes(name: str, source: GPT2Config) -> None:
    """Refuse a folder that holds less than a byte for each weight of its config.json: they would be allocated first."""
    width, rows = source.n_embd, source.vocab_size + source.n_positions
    files = [file for pattern in ("*.safetensors", "*.bin") for file in Path(name).glob(pattern)]
    held = sum(file.stat().st_size for file in files)
    if files and held < width * (12 * width * source.n_layer + rows):
        raise UserError(f"-p {name}: the weights are damaged: {held} bytes are too few for its config.json")


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Errors only: a load that fails is told in one line, without transformers' report before it."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


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
    path = folder / "model.safetensors"
    path.touch()
    mode = path.stat().st_mode  # as this process makes files; safetensors' own could be read by nobody else
    try:
        save_file(state, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from None
    path.chmod(mode)
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
