"""A run in Hugging Face's form: `main.py -t export -m RUN --to FOLDER`, held against the run before it is let go.

The folder has the weights and config.json (from the model family's own `save_pretrained`), the tokenizer with a chat
template, generation_config.json and a model card. It is made beside its place, read back by transformers, and renamed
only when that gives the same tokens (of a reward model: the same scores) as the model it was made of.

Shapes: B rows, L columns, T tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config.scrub import scrub
from config.user_error import RunStopped, UserError
from experiments.doctor.record import read_series
from experiments.graded_answers import text_model
from experiments.markdown import table
from inference.answers import TextModel
from inference.systems import load_reward_model, run_around
from models.generation import generate
from models.weights.checkpoint import describe
from utils.chat_templates import chat_template
from utils.runs.durable import Disk
from utils.runs.finding import find_checkpoint
from utils.runs.folder import typed_path
from utils.runs.origins import without_folders
from utils.tokenizers.huggingface import quiet_transformers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# How far logits and scores may be from the model's own; logits in standard deviations. fp32: another order of the sums.
# The others: rounded weights. The demo's policy is off by 2e-6, 0.018 and 0.0021; deeper models are given room.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.2, "fp16": 0.03}

_CONFIG, _TOKENIZER = "config.json", "tokenizer_config.json"
_SPARE = 2**24  # bytes for the tokenizer, in several forms, and the card

_QUESTIONS = ("What is the capital of Italy?", "Hello.", "Please tell me how many legs a hen has, and why.")
_DIALOGUE = ("Hi!", "Hello. How can I help?", "  What is 2 + 2?\n")
# Spaces, line ends, marks of other tokenizers, characters of several bytes and of several code points.
_TEXTS = (
    "", " ", "\n\n", "a", " two  spaces ", "\ttab\r\nline", "It's 10 o'clock, they'll say", "<|endoftext|>", "<|pad|>",
    "x<|endoftext|>y", "[INST] <s> </s> <|im_end|>", "Zo\u00eb \u4e2d\u6587 \u0639\u0631\u0628\u064a", "e\u0301",
    "\u2764\ufe0f \U0001f468\u200d\U0001f469", "\u00a0\u2003\u3000", "\x00\x07", "3.14e-10", "def f(x):\n    return x",
)  # fmt: skip

def run(parser: argparse.ArgumentParser, rest: list[str]) -> int:
    """Write a language model or a reward model of ours as a folder of `transformers`."""
    text = "run (its folder or name) or checkpoint of a language model (SFT or PPO) or of a reward model"
    parser.add_argument("-m", "--model", required=True, help=text)
    parser.add_argument("--to", required=True, help="the folder to write; made if it is not there")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that stands there")
    text = "type of the weights in the file (default fp32)"
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help=text)
    parser.add_argument("--runs-dir", default="runs", help="where runs are looked for")
    flags = parser.parse_args(rest)
    checkpoint = _checkpoint(flags.model, flags.runs_dir)
    target = _target(flags.to, flags.overwrite, checkpoint)
    description = describe(checkpoint)
    is_reward = description["role"] == "reward"
    flag = f"-m {flags.model}"
    source = load_reward_model(checkpoint, flag) if is_reward else text_model(checkpoint)
    room = 0 if is_reward else _room(checkpoint, source.context)
    export = Export(source, flags.dtype, is_reward, _temperature(checkpoint, description), room)
    with _replacing(target, flags.to) as folder:
        export.write(folder)
        told = export.check(folder)
        (folder / "README.md").write_text(_card(export, target.name, checkpoint, description, told), encoding="utf-8")
    parameters = sum(p.numel() for p in source.model.parameters())
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{target}: {parameters:,} parameters in {flags.dtype}, {size / 1e6:.1f} MB, from {checkpoint}")
    print("read back by transformers: " + told)
    return 0


def _checkpoint(argument: str, runs_dir: str) -> Path:
    """The checkpoint to export; UserError where there is none, it is a critic, or it is in Hugging Face's form."""
    folder = typed_path(argument)
    if (folder / _CONFIG).is_file() and not (folder / "model.json").is_file():
        raise UserError(f"-m {argument}: is in Hugging Face's form already; give a run or checkpoint of ours")
    checkpoint = find_checkpoint(argument, runs_dir, "-m")
    if describe(checkpoint)["role"] == "critic":
        told = "holds a critic, whose values of every token have no place in Hugging Face's form"
        raise UserError(f"-m {argument}: {told}; give an SFT, PPO or reward model")
    return checkpoint


def _record(checkpoint: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The run around a checkpoint, its hyperparams.json and the flags in it; a run from elsewhere may hold anything."""
    run, record = run_around(checkpoint)
    record = record if isinstance(record, dict) else {}
    config = record.get("config")
    return run, record, config if isinstance(config, dict) else {}


def _temperature(checkpoint: Path, description: dict[str, Any]) -> float:
    """That of PPO's rollouts, where its policy is what was trained; 1 for other stages."""
    value = _record(checkpoint)[2].get("temperature") if description.get("stage") == "ppo" else 1.0
    return float(value) if isinstance(value, int | float) and 0 < value < math.inf else 1.0


def _room(checkpoint: Path, context: int) -> int:
    """Tokens of an answer: as many as PPO's responses had, 64 after SFT, and at most half of the context."""
    value = _record(checkpoint)[2].get("response_length")
    return min(value if isinstance(value, int) and value > 0 else 64, context // 2)


def _target(argument: str, overwrite: bool, checkpoint: Path) -> Path:
    """The folder to write, through links; UserError where something stands there, or the place is a bad one."""
    if not argument.strip():
        raise UserError("--to: is empty; give the folder to write")
    try:
        target = Path(argument).expanduser().resolve()
        there = sorted(target.iterdir()) if target.is_dir() else None
        is_taken = there is None and target.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, a home or a loop of links that leads nowhere
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--to {argument}: cannot be used ({reason}); give another folder") from None
    if is_taken:
        raise UserError(f"--to {argument}: is a file; give a folder")
    if Path.cwd().is_relative_to(target):
        raise UserError(f"--to {argument}: is the working folder or around it; give a folder of its own")
    if target.is_relative_to(checkpoint):
        raise UserError(f"--to {argument}: is inside the checkpoint {checkpoint}; give a folder outside it")
    if there and not overwrite:
        raise UserError(f"--to {argument}: is not empty ({there[0].name}, ...); --overwrite replaces an export")
    other = next((path for path in there or () if path.is_symlink() or not path.is_file()), None)
    if other is not None or (there and not {target / _CONFIG, target / _TOKENIZER} <= set(there)):
        why = f"it holds {other.name}" if other is not None else f"it has no {_CONFIG} and {_TOKENIZER}"
        raise UserError(f"--to {argument}: --overwrite replaces an export, and this is none ({why}); give another one")
    return target


@contextlib.contextmanager
def _replacing(target: Path, argument: str) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when the body ends; after any exception it is gone.

    Raises:
        UserError: it cannot be written: no room, no permission.
    """
    disk, fresh = Disk(), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".writing", dir=target.parent))
        mask = os.umask(0)
        os.umask(mask)
        fresh.chmod(0o755 & ~mask)
        yield fresh
        for path in sorted(fresh.iterdir()):
            path.chmod(0o644 & ~mask)
            disk.sync(path)
        disk.sync(fresh)
        if target.exists() and any(target.iterdir()):
            old = fresh.with_suffix(".old")
            disk.rename(target, old)
            try:
                disk.rename(fresh, target)
            except OSError:
                disk.rename(old, target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            disk.rename(fresh, target)
        disk.sync(target.parent)
    except OSError as error:
        told = f"cannot be written ({error.strerror or error}); give a place with room that can be written"
        raise UserError(f"--to {argument}: {told}") from None
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)


@dataclass(frozen=True)
class Export:
    """What is exported.

    source: the model. dtype: of the weights in the file. temperature: at which a language model is sampled. room:
    tokens of the context that are kept for its answers; 0 for a reward model.
    """

    source: TextModel
    dtype: str
    is_reward: bool
    temperature: float
    room: int

    @property
    def longest_text(self) -> int:
        """Tokens to which transformers cuts a text when it is asked to; what is sampled behind it fits the context."""
        return self.source.context - self.room

    def told_of_room(self) -> str:
        """How long an answer can be behind a text that was cut."""
        return f", so that {self.room} tokens of an answer fit" if self.room else ""

    def write(self, folder: Path) -> None:
        """All files but the card; OSError where they cannot be written."""
        from transformers import GenerationConfig

        model, tokenizer = self.source.model, self.source.tokenizer
        width = DTYPES[self.dtype].itemsize
        needed = width * sum(p.numel() for p in model.parameters()) + _SPARE
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(f"it needs {needed / 1e6:.0f} MB, and {free / 1e6:.0f} are free")
        template = chat_template(self.source.template)
        try:
            pad_id = tokenizer.export_huggingface(folder, self.longest_text, template, own_pad=self.is_reward)
        except Exception as error:
            if type(error) is Exception:  # what tokenizers makes of a full disk
                raise OSError(str(error)) from None
            raise
        model.save_pretrained(folder, eos_id=tokenizer.eos_id, pad_id=pad_id, dtype=DTYPES[self.dtype])
        if not self.is_reward:
            sampling = dict(do_sample=True, temperature=self.temperature)
            ids = dict(bos_token_id=tokenizer.eos_id, eos_token_id=tokenizer.eos_id, pad_token_id=pad_id)
            GenerationConfig(max_new_tokens=self.room, **sampling, **ids).save_pretrained(folder)

    def check(self, folder: Path) -> str:
        """Read the folder as transformers does and hold it against the model; a line on what was found.

        Raises:
            RunStopped: it is not the same.
        """
        try:
            with quiet_transformers(), torch.no_grad():
                return self._read_back(folder)
        except RunStopped:
            raise
        except Exception as error:  # transformers raises many kinds
            raise _not_the_model(f"{type(error).__name__}: {error}") from error

    def _read_back(self, folder: Path) -> str:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._check_tokenizer(tokenizer)
        auto = AutoModelForSequenceClassification if self.is_reward else AutoModelForCausalLM
        # In fp32, where only the rounding of the weights is left of a smaller type.
        options = dict(dtype=torch.float32, local_files_only=True, output_loading_info=True)
        model, report = auto.from_pretrained(folder, **options)
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            _must(not report[what], f"the weights have {what.replace('_', ' ')}: {sorted(report[what])[:3]}")
        _must(tokenizer.pad_token_id == model.config.pad_token_id, "config.json has another padding id")
        check = self._check_scores if self.is_reward else self._check_tokens
        return check(model.eval(), tokenizer)

    def _check_tokenizer(self, tokenizer: Any) -> None:
        """The same ids, end and dialogues."""
        ours, template = self.source.tokenizer, self.source.template
        _must(tokenizer.eos_token_id == ours.eos_id, "the tokenizer ends texts with another id")
        _must(tokenizer.model_max_length == self.longest_text, "the tokenizer does not know the context")
        side = "right" if self.is_reward else "left"
        _must(tokenizer.padding_side == side, f"the tokenizer does not pad on the {side}")
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        has_prefix = ours.encode(" a") == ours.encode("a")  # it takes a first space for the prefix that it puts there
        for text in _TEXTS:
            ids = ours.encode(text)
            text = text.removeprefix(" ") if has_prefix else text
            _must(tokenizer(text, split_special_tokens=True)["input_ids"] == ids, f"{text!r} gets other ids")
            plain = not any(token in text for token in special)
            _must(not plain or tokenizer(text)["input_ids"] == ids, f"{text!r} gets other ids")
            _must(tokenizer.decode(ids) == ours.decode(ids), f"{text!r} comes back as another text")
        for turns in [(question,) for question in _QUESTIONS] + [_DIALOGUE]:
            for system in ("", " Be brief.\n"):
                chat = _messages(turns, system)
                told = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
                prompt = template.prompt_of_turns([(message["role"], message["content"]) for message in chat])
                wanted = template.encode_prompts(ours, [prompt])[0]
                _must(told == wanted, "the chat template writes another prompt")
        ended = tokenizer.apply_chat_template(_messages(_DIALOGUE[:2]), return_dict=False)
        wanted = template.encode_prompts(ours, [template.format(_DIALOGUE[:1])])[0]
        wanted += template.encode_responses(ours, [template.response(_DIALOGUE[1])])[0]
        _must(ended == wanted, "the chat template writes another dialogue")

    def _check_tokens(self, model: Any, tokenizer: Any) -> str:
        """Logits, and greedy answers to padded prompts, are the model's own."""
        ours, context = self.source, self.source.context
        eos_id, pad_id = ours.tokenizer.eos_id, ours.tokenizer.pad_id
        _must(model.generation_config.eos_token_id == eos_id, "generation ends at another id")
        texts = [ours.template.format([question]) for question in _QUESTIONS]
        prompts = [ids[-(context // 2) :] for ids in ours.template.encode_prompts(ours.tokenizer, texts)]
        limit = min(32, context - max(map(len, prompts)))
        answers = generate(ours.model, prompts, max_new_tokens=limit, eos_id=eos_id, pad_id=pad_id, temperature=0.0)
        batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        rows = model.generate(**batch, max_new_tokens=limit, do_sample=False)[:, batch["input_ids"].shape[1] :]
        same = total = 0
        worst = 0.0
        for b, prompt in enumerate(prompts):
            mine = answers.row(b).tolist()
            ids, at = torch.tensor([[*prompt, *mine]]), slice(len(prompt) - 1, len(prompt) + len(mine) - 1)
            wanted, found = ours.model(ids)[0, at], model(ids).logits[0, at]  # (T, V)
            off = self._distance(found, wanted, float(wanted.std()), "logits")
            theirs = rows[b, : len(mine)].tolist()
            agree = next((t for t in range(len(mine)) if theirs[t : t + 1] != mine[t : t + 1]), len(mine))
            if agree < len(mine):  # allowed only where rounding can turn the choice
                first, second = wanted[agree].topk(2).values.tolist()
                _must(first - second <= 2 * off, f"the greedy answer to prompt {b + 1} differs at token {agree + 1}")
            same, total, worst = same + agree, total + len(mine), max(worst, off)
        what = f"the same {total} tokens" if same == total else f"{same} of {total} tokens the same until near ties"
        ended = int(answers.ended.sum())
        return f"{what} in {len(prompts)} greedy answers ({ended} of them ended), logits within {worst:.1g}"

    def _check_scores(self, model: Any, tokenizer: Any) -> str:
        """Scores of padded rows are the model's own."""
        ours, context = self.source, self.source.context
        replies = ("Rome.", "Hello. How can I help you today?", "A hen has two legs, and so has every bird.")
        dialogues = [_messages(turns) for turns in zip(_QUESTIONS, replies)]
        texts = [tokenizer.apply_chat_template(dialogue, tokenize=False) for dialogue in dialogues]
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        found = model(**batch).logits[:, 0]  # (B,)
        wanted = []
        for question, reply in zip(_QUESTIONS, replies):
            asked = ours.template.encode_prompts(ours.tokenizer, [ours.template.format([question])])[0]
            said = ours.template.encode_responses(ours.tokenizer, [ours.template.response(reply)])[0]
            ids = torch.tensor([[*asked, *said][-context:]])
            wanted.append(ours.model(ids, torch.ones_like(ids, dtype=torch.bool)))
        scores = torch.cat(wanted)
        off = self._distance(found, scores, max(1.0, float(scores.abs().max())), "scores")
        return f"the scores of {len(texts)} padded rows within {off:.1g}"

    def _distance(self, found: Tensor, wanted: Tensor, scale: float, what: str) -> float:
        """The largest difference between two tensors of one shape; RunStopped where it is beyond the tolerance."""
        off, allowed = float((found - wanted).abs().max()), TOLERANCE[self.dtype] * scale
        _must(off <= allowed, f"the {what} are off by {off:.2g}, where {allowed:.2g} is allowed")
        return off


def _must(holds: bool, fault: str) -> None:
    if not holds:
        raise _not_the_model(fault)


def _not_the_model(fault: str) -> RunStopped:
    return RunStopped(f"the export is not the model: {fault[:300]}; nothing was left of it")


def _messages(turns: Sequence[str], system: str = "") -> list[dict[str, str]]:
    """Turns of user and assistant as chat messages."""
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


_USE = {
    False: """\
from transformers import pipeline

chat = pipeline("text-generation", "{name}")
print(chat([{{"role": "user", "content": "Hello."}}], do_sample=False)[0]["generated_text"][-1]["content"])
""",
    True: """\
from transformers import pipeline

score = pipeline("text-classification", "{name}")
dialogue = [{{"role": "user", "content": "Hello."}}, {{"role": "assistant", "content": "Hello. How can I help?"}}]
print(score(score.tokenizer.apply_chat_template(dialogue, tokenize=False)))
""",
}


def _card(export: Export, name: str, checkpoint: Path, description: dict[str, Any], told: str) -> str:
    """README.md: what the run's records say, and nothing else."""
    folder, record, config = _record(checkpoint)
    stage, step = str(description.get("stage")), description.get("step")
    facts = {
        "run": without_folders(checkpoint),
        "stage": {"sft": "supervised fine-tuning (SFT)", "rm": "reward model", "ppo": "PPO"}.get(stage, stage),
        "steps": step,
        "trained from": without_folders(str(description.get("trained_from") or "")),
        "reward model": without_folders(str(record.get("rm") or "")),
        "reward function": Path(str(config.get("reward_fn") or "")).name,
        "data set": Path(str(config.get("dataset") or "")).name,
        "preset": config.get("config"),
        "seed": config.get("seed"),
        "commit": record.get("commit"),
    }
    template = export.source.template
    marks = template.marks
    written = template.format(["..."]) if marks is None else marks.prompt([("user", "...")])
    told_of_system = "as plain text before it (none was trained on)" if marks is None else "in the same form"
    parts = [
        "---",
        f"library_name: transformers\npipeline_tag: text-{'classification' if export.is_reward else 'generation'}",
        "---",
        f"# {_cell(folder.name)}\n",
        table("from its records | ", [(key, _cell(value)) for key, value in facts.items() if value not in (None, "")]),
    ]
    figures = _figures(folder, step)
    if figures:
        parts.append("\nLast figures on held-out data, as the run wrote them:\n")
        parts.append(table("figure | step | value", figures))
    parts.append("\n## Use\n\n```python\n" + _USE[export.is_reward].format(name=name) + "```\n")
    parts.append(
        f"The context is {export.source.context} tokens. A prompt is written {written!r}; the chat template does so, "
        f"with a system message {told_of_system}. For a longer prompt "
        f"`truncation=True` cuts its start off{export.told_of_room()}. A text with the EOS token written in it is read "
        "as its end, as everywhere in transformers; `split_special_tokens=True` prevents that.\n"
    )
    parts.append(f"Weights: {export.dtype}. Read back by transformers: {told}.\n")
    parts.append(
        "## Licence\n\nNone is given here. What applies depends on the model it was trained from and on its data."
    )
    return "\n".join(parts) + "\n"


def _figures(run: Path, step: Any) -> list[tuple[str, int, str]]:
    """The last value of every figure on held-out data up to the checkpoint's step; [] where there is no record."""
    try:
        series = read_series(run / "metrics.jsonl")
    except UserError:
        return []
    rows = []
    for tag, points in series.items():
        points = points.finite().kept(points.finite().steps <= (step if isinstance(step, int) else -1))
        if tag.startswith("eval/") and len(points):
            rows.append((_cell(tag), *points.point(-1)))
    return [(tag, at, f"{value:.4g}") for tag, at, value in rows]


def _cell(value: object) -> str:
    """A value of a record in a line of markdown."""
    return scrub(" ".join(str(value).split())).replace("|", "\\|").replace("<", "&lt;")
