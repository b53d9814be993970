"""Language models from and to Hugging Face's form, whatever the family: `form.py` says what differs between them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from config.model_configs import ModelConfig
from config.user_error import UserError
from models.lora import merge_lora
from models.weights.adapter import Adapter, merge_adapter, read_adapter
from models.weights.checkpoint import WEIGHTS, build, check_finite, write_tensors
from models.weights.form import HuggingFaceForm
from models.weights.gguf import Gguf, read_gguf
from models.weights.gpt2 import GPT2Form
from models.weights.llama import LlamaForm
from models.weights.pretrained import ADAPTER_CONFIG, CONFIG, check_files, gguf_file
from utils.hub import LFS_POINTER, hub_folder, is_lfs_pointer
from utils.runs.folder import typed_path
from utils.tokenizer import Tokenizer, model_tokenizer
from utils.tokenizers.huggingface import has_tokenizer, quiet_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Model = TypeVar("Model", bound=nn.Module)

FORMS: dict[str, HuggingFaceForm] = {form.model_type: form for form in (GPT2Form(), LlamaForm())}
"""By `model_type` of config.json."""
_KNOWN = " or ".join(form.what for form in FORMS.values())


def load_pretrained(
    cls: type[Model], name_or_path: str | Path, config: ModelConfig | None = None, vocab_size: int | None = None
) -> Model:
    """Build `cls` from a model in Hugging Face's form: a hub name (`gpt2-medium`) or a folder. Sizes come from its
    config.json.

    Args:
        cls: a model class or one of its roles; a role's head is left at its random start.
        name_or_path: what `transformers` would be given.
        config: preset whose adapters, dropout and memory options are wanted.
        vocab_size: ids of the tokenizer; a token table with more rows is kept, its extra logits are never computed.

    Raises:
        UserError: not found (offline, say), damaged, of another family, or one with parts that this model does not
            have.
    """
    return load_described(cls, describe_pretrained(str(name_or_path)), config, vocab_size)


def load_described(
    cls: type[Model], found: Pretrained, config: ModelConfig | None = None, vocab_size: int | None = None
) -> Model:
    """`load_pretrained` of a model that was found and checked already."""
    name, form = found.name, found.form
    if form.family != cls.family:
        raise UserError(f"-p {name}: holds {form.what}; {_what(cls.family)} is needed")
    rows = found.config.vocab_size
    if vocab_size is not None and vocab_size > rows:
        raise UserError(
            f"-p {name}: its token table has {rows} rows, the tokenizer {vocab_size} ids; choose its own --tokenizer"
        )
    state = _read(found)
    sizes = found.sizes(vocab_size)
    wanted = sizes if config is None else sizes.with_options(config)
    if cls.role != "lm":
        state = {key: value for key, value in state.items() if key not in cls.only_for_language}
    return build(cls, wanted, state, f"-p {name}: is not {form.what} as it should be", new_head=True, new_adapters=True)


def _what(family: str) -> str:
    return next(form.what for form in FORMS.values() if form.family == family)


@dataclass(frozen=True)
class Pretrained:
    """A model in Hugging Face's form that one of this project's computes, before its weights are read.

    name: as it was given. source: the folder or hub name of the weights. config: its config.json. folder: where that
    lies. adapter: the LoRA adapter that `name` is, to be merged into the weights. note: what is to be told, or "".
    gguf: the GGUF file that all of it stands in, if it is one.
    """

    name: str
    source: str
    config: PretrainedConfig
    folder: Path
    adapter: Adapter | None = None
    note: str = ""
    gguf: Gguf | None = None

    @property
    def form(self) -> HuggingFaceForm:
        """What its family looks like."""
        return FORMS[self.config.model_type]

    def sizes(self, vocab_size: int | None = None) -> ModelConfig:
        """Its sizes as this project has them, for a tokenizer of so many ids (None: as many as its table has rows)."""
        return self.form.sizes(self.config, self.name, vocab_size or self.config.vocab_size)

    def tokenizer(self, flag: str, choose: str = "") -> tuple[Tokenizer, str]:
        """Its tokenizer, and a line on it or "": see `utils.tokenizer.model_tokenizer`."""
        if self.gguf is not None:
            with TemporaryDirectory() as name, told_as(f"-p {self.name}"):
                self.gguf.save_tokenizer(Path(name))
                tokenizer, note = model_tokenizer(name, Path(name), self.config.vocab_size, flag, choose)
            tokenizer.name = Path(self.name).stem
            return tokenizer, note
        own = self.adapter is not None and has_tokenizer(self.adapter.folder)
        model, folder = (self.name, self.adapter.folder) if own else (self.source, self.folder)
        return model_tokenizer(model, folder, self.config.vocab_size, flag, choose)


def describe_pretrained(name: str, cached_only: bool = False) -> Pretrained:
    """Find and check a model in Hugging Face's form by all but its weights.

    Args:
        name: a folder or a hub name; of a model, or of a LoRA adapter of one. Or a GGUF file of a LLaMA.
        cached_only: of the hub take only what was downloaded before.

    Raises:
        UserError: not found (offline, say), of a family that is not known here, or with parts that our model of it
            does not have.
    """
    local = typed_path(name)
    if (file := gguf_file(local)) is not None:
        with told_as(f"-p {name}"):
            gguf = read_gguf(file)
        _check_plain(name, gguf.config)
        return Pretrained(name, str(file), gguf.config, file.parent, gguf=gguf)
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
    form = FORMS[config.model_type]
    is_other = bool(kind) and kind not in (form.classes["lm"], form.bare)
    note = f"{name} is a {kind}: its head is left out, and its trunk was trained for that head" if is_other else ""
    return Pretrained(name, str(folder) if local.exists() else name, config, folder, note=note)


def _config(name: str, folder: Path) -> PretrainedConfig:
    """config.json of a folder; UserError where it is not that of a model that one of this project's computes."""
    from transformers import AutoConfig  # transformers takes seconds to import and is needed only here

    if (folder / CONFIG).is_file() and is_lfs_pointer(folder / CONFIG):
        raise UserError(f"-p {name}: {CONFIG} {LFS_POINTER}")
    try:
        with quiet_transformers():
            # Said aloud: unsaid, transformers asks on the terminal whether to run the folder's Python files.
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
            if config.model_type not in FORMS:
                raise UserError(f"-p {name}: holds a {config.model_type} model; {_KNOWN} is needed")
            _check_plain(name, config)
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds for sizes that are none
        raise _unreadable(name, error) from None
    return config


@contextlib.contextmanager
def told_as(flag: str) -> Iterator[None]:
    """Errors on a GGUF file start with its path; here with the flag that named it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag}: {str(error).partition(': ')[2] or error}") from None


def _read(found: Pretrained) -> dict[str, Tensor]:
    """The tensors of a language model by our names, with the adapter merged in."""
    if found.gguf is None:
        state = _read_folder(found)
    else:
        with told_as(f"-p {found.name}"):
            state = found.form.ours(found.gguf.state())
    if found.adapter is not None:
        merge_adapter(state, found.adapter, found.name, found.form)
    check_finite(state, f"-p {found.name}: holds NaN or infinity")
    return state


def _read_folder(found: Pretrained) -> dict[str, Tensor]:
    """The tensors of a language model by our names, from a folder or the hub."""
    name, form = found.name, found.form
    tied = form.output == "" or found.config.tie_word_embeddings
    try:
        with quiet_transformers():
            plain = form.plain(found.config)
            model, report = form.language_model().from_pretrained(
                found.source, config=plain, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from None
    except (SafetensorError, UnpicklingError, RuntimeError):
        raise UserError(f"-p {name}: the weights are damaged or their shapes not those of its config.json") from None
    # transformers fills gaps with random numbers and leaves out what it does not know; both would go unnoticed.
    head = "lm_head.weight"
    read = (form.trunk,) if tied else (form.trunk, head)
    for what in ("missing_keys", "unexpected_keys"):
        keys = sorted(key for key in report[what] if key.startswith(read) and not key.endswith(form.old_buffers))
        if head in keys or (head in report[what] and not plain.tie_word_embeddings and what == "missing_keys"):
            raise UserError(
                f'-p {name}: its config.json says "tie_word_embeddings": false, but its weights have no {head}; where '
                "the token table is the output projection, as in GPT-2, that should be true"
            )
        if keys:
            kind = what.partition("_")[0]
            raise UserError(f"-p {name}: the weights are not those of its config.json ({kind} {', '.join(keys[:3])})")
    weights = model.state_dict()
    if tied:
        if not torch.equal(weights[head], weights[form.table]):
            raise UserError(f"-p {name}: has an output projection of its own; one with tied embeddings is needed")
        del weights[head]
    return form.ours(weights)


def _unreadable(name: str, error: Exception) -> UserError:
    """What is told of an error that transformers raised."""
    if "trust_remote_code" in str(error):
        return UserError(
            f"-p {name}: needs Python code of its own (auto_map), which is never run; {_KNOWN} is needed"
        )
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if typed_path(name).exists():
        return UserError(f"-p {name}: cannot be read ({reason}); give a whole config.json and model.safetensors")
    remedy = "go online once, or give a folder"
    return UserError(f"-p {name}: cannot be loaded from Hugging Face ({reason}); {remedy}")


def _check_plain(name: str, source: PretrainedConfig) -> None:
    """Refuse the options of transformers' model that change what it computes."""
    form = FORMS[source.model_type]
    quantised = getattr(source, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method", "") if isinstance(quantised, dict) else quantised.quant_method
        raise UserError(
            f"-p {name}: its weights are quantised ({getattr(method, 'value', method) or 'by some method'}); give the "
            "model that it was made from"
        )
    if empty := form.empty_size(source):
        raise UserError(f"-p {name}: its config.json has {getattr(source, empty)} as {empty}; copy it again")
    if fault := form.check(source):
        raise UserError(f"-p {name}: {fault}")


def _check_sizes(name: str, folder: Path, source: PretrainedConfig) -> None:
    """Refuse a folder that holds less than a byte for each weight of its config.json: they would be allocated first."""
    files = [file for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern)]
    held = sum(file.stat().st_size for file in files if file.is_file())
    if files and held < FORMS[source.model_type].least_numbers(source):
        raise UserError(f"-p {name}: the weights are damaged: {held} bytes are too few for its config.json")


def save_pretrained(
    model: nn.Module, folder: Path, eos_id: int | None = None, pad_id: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Write config.json and model.safetensors as transformers reads them: a language model as the family's CausalLM, a
    reward model as its SequenceClassification with one label.

    Adapters are merged in. Rows of the token table behind the vocabulary are left out, so that transformers cannot
    sample them either. A constant of a reward model's scores that transformers' head has no place for stands in
    config.json as "reward_constant": add it to its scores to have ours.

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
    config: ModelConfig = plain.config
    form = next(form for form in FORMS.values() if form.family == model.family)
    state = form.theirs({key: value.detach().cpu() for key, value in plain.state_dict().items()})
    tables = [key for key in (form.table, "lm_head.weight") if key in state]
    state |= {key: state[key][: config.vocab_size] for key in tables}
    description = {
        "architectures": [form.classes[model.role]], "model_type": form.model_type, **form.description(config),
        "bos_token_id": eos_id, "eos_token_id": eos_id,
    }  # fmt: skip
    if pad_id is not None:
        description["pad_token_id"] = pad_id
    if model.role == "reward":
        table = state[form.table]
        state[form.table] = torch.cat([table, table.new_zeros(max(0, pad_id + 1 - len(table)), table.shape[1])])
        state, constant = form.fold_head(state)
        # Of a regression transformers' pipeline gives the score as it is, and not its sigmoid.
        description |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        description["problem_type"] = "regression"
        description |= {"reward_constant": constant} if constant else {}
    description |= {"vocab_size": len(state[form.table]), "dtype": str(dtype).removeprefix("torch.")}
    state = {key: value.to(dtype, copy=True).contiguous() for key, value in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(state, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")
