"""What an export holds: how it is written, and how it is held against the model that it was made of.

Shapes: B rows, L columns, T tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config.user_error import RunStopped, UserError
from inference.answers import TextModel
from models.generation import generate
from utils.chat_templates import chat_template
from utils.tokenizers.huggingface import quiet_transformers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# How far logits and scores may be from the model's own; logits in standard deviations. fp32: another order of the sums.
# The others: rounded weights. The demo's policy is off by 2e-6, 0.018 and 0.0021; deeper models are given room.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.2, "fp16": 0.03}
_SCORES = {**TOLERANCE, "fp32": 1e-4}

_SPARE = 2**24  # bytes for the tokenizer, in several forms, and the card

_QUESTIONS = ("What is the capital of Italy?", "Hello.", "Please tell me how many legs a hen has, and why.")
_DIALOGUE = ("Hi!", "Hello. How can I help?", "  What is 2 + 2?\n")
# Spaces, line ends, marks of other tokenizers, characters of several bytes and of several code points.
TEXTS = (
    "", " ", "\n\n", "a", " two  spaces ", "\ttab\r\nline", "It's 10 o'clock, they'll say", "<|endoftext|>", "<|pad|>",
    "x<|endoftext|>y", "[INST] <s> </s> <|im_end|>", "Zo\u00eb \u4e2d\u6587 \u0639\u0631\u0628\u064a", "e\u0301",
    "\u2764\ufe0f \U0001f468\u200d\U0001f469", "\u00a0\u2003\u3000", "\x00\x07", "3.14e-10", "def f(x):\n    return x",
)  # fmt: skip


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
    def stop_ids(self) -> list[int]:
        """Every id that ends an answer, the EOS first."""
        return list(self.source.tokenizer.stop_ids)

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
        first, *others = self.stop_ids
        try:
            pad_id = tokenizer.export_huggingface(folder, self.longest_text, template, own_pad=self.is_reward)
        except Exception as error:
            if type(error) is Exception:  # what tokenizers makes of a full disk
                raise OSError(str(error)) from None
            raise
        model.save_pretrained(folder, eos_id=first, pad_id=pad_id, dtype=DTYPES[self.dtype])
        if not self.is_reward:
            sampling = dict(do_sample=True, temperature=self.temperature)
            ends = [first, *others] if others else first
            ids = dict(bos_token_id=first, eos_token_id=ends, pad_token_id=pad_id)
            GenerationConfig(max_new_tokens=self.room, **sampling, **ids).save_pretrained(folder)

    def check(self, folder: Path) -> str:
        """Read the folder as transformers does and hold it against the model; a line on what was found.

        Raises:
            RunStopped: it is not the same.
        """
        with reading_back():
            from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._check_tokenizer(tokenizer)
            model = read_model(AutoModelForSequenceClassification if self.is_reward else AutoModelForCausalLM, folder)
            must(tokenizer.pad_token_id == model.config.pad_token_id, "config.json has another padding id")
            return self._scores(model, tokenizer) if self.is_reward else self.answers(model, tokenizer)

    def _check_tokenizer(self, tokenizer: Any) -> None:
        """The same ids, end and dialogues."""
        ours, template = self.source.tokenizer, self.source.template
        must(tokenizer.eos_token_id == ours.eos_id, "the tokenizer ends texts with another id")
        must(tokenizer.model_max_length == self.longest_text, "the tokenizer does not know the context")
        side = "right" if self.is_reward else "left"
        must(tokenizer.padding_side == side, f"the tokenizer does not pad on the {side}")
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        has_prefix = ours.encode(" a") == ours.encode("a")  # it takes a first space for the prefix that it puts there
        for text in TEXTS:
            ids = ours.encode(text)
            text = text.removeprefix(" ") if has_prefix else text
            must(tokenizer(text, split_special_tokens=True)["input_ids"] == ids, f"{text!r} gets other ids")
            plain = not any(token in text for token in special)
            must(not plain or tokenizer(text)["input_ids"] == ids, f"{text!r} gets other ids")
            must(tokenizer.decode(ids) == ours.decode(ids), f"{text!r} comes back as another text")
        for turns in [(question,) for question in _QUESTIONS] + [_DIALOGUE]:
            for system in ("", " Be brief.\n"):
                chat = _messages(turns, system)
                told = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
                prompt = template.prompt_of_turns([(message["role"], message["content"]) for message in chat])
                wanted = template.encode_prompts(ours, [prompt])[0]
                must(told == wanted, "the chat template writes another prompt")
        ended = tokenizer.apply_chat_template(_messages(_DIALOGUE[:2]), return_dict=False)
        wanted = template.encode_prompts(ours, [template.format(_DIALOGUE[:1])])[0]
        wanted += template.encode_responses(ours, [template.response(_DIALOGUE[1])])[0]
        must(ended == wanted, "the chat template writes another dialogue")

    def answers(self, model: Any, tokenizer: Any, allowed: float | None = None) -> str:
        """Logits, and greedy answers to padded prompts, are the model's own; a line on how nearly.

        Args:
            model, tokenizer: transformers', read back.
            allowed: how far logits may be off, in standard deviations; by default as its type has it.
        """
        ours, context = self.source, self.source.context
        allowed = TOLERANCE[self.dtype] if allowed is None else allowed
        options = dict(eos_id=self.stop_ids, pad_id=ours.tokenizer.pad_id, temperature=0.0)
        ends = model.generation_config.eos_token_id
        must((ends if isinstance(ends, list) else [ends]) == self.stop_ids, "generation ends at another id")
        texts = [ours.template.format([question]) for question in _QUESTIONS]
        prompts = [ids[-(context // 2) :] for ids in ours.template.encode_prompts(ours.tokenizer, texts)]
        limit = min(32, context - max(map(len, prompts)))
        answers = generate(ours.model, prompts, max_new_tokens=limit, **options)
        batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        rows = model.generate(**batch, max_new_tokens=limit, do_sample=False)[:, batch["input_ids"].shape[1] :]
        same = total = 0
        worst = 0.0
        for b, prompt in enumerate(prompts):
            mine = answers.row(b).tolist()
            ids, at = torch.tensor([[*prompt, *mine]]), slice(len(prompt) - 1, len(prompt) + len(mine) - 1)
            wanted, found = ours.model(ids)[0, at], model(ids).logits[0, at]  # (T, V)
            off = _distance(found, wanted, allowed * float(wanted.std()), "logits")
            theirs = rows[b, : len(mine)].tolist()
            agree = next((t for t in range(len(mine)) if theirs[t : t + 1] != mine[t : t + 1]), len(mine))
            if agree < len(mine):  # allowed only where rounding can turn the choice
                first, second = wanted[agree].topk(2).values.tolist()
                must(first - second <= 2 * off, f"the greedy answer to prompt {b + 1} differs at token {agree + 1}")
            same, total, worst = same + agree, total + len(mine), max(worst, off)
        what = f"the same {total} tokens" if same == total else f"{same} of {total} tokens the same until near ties"
        ended = int(answers.ended.sum())
        return f"{what} in {len(prompts)} greedy answers ({ended} of them ended), logits within {worst:.1g}"

    def _scores(self, model: Any, tokenizer: Any) -> str:
        """Scores of padded rows are the model's own, and in the same order."""
        ours, context = self.source, self.source.context
        replies = ("Rome.", "Hello. How can I help you today?", "A hen has two legs, and so has every bird.")
        dialogues = [_messages(turns) for turns in zip(_QUESTIONS, replies)]
        texts = [tokenizer.apply_chat_template(dialogue, tokenize=False) for dialogue in dialogues]
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        # A constant that the model's class has no place for is told beside it.
        found = model(**batch).logits[:, 0] + getattr(model.config, "reward_constant", 0.0)  # (B,)
        wanted = []
        for question, reply in zip(_QUESTIONS, replies):
            asked = ours.template.encode_prompts(ours.tokenizer, [ours.template.format([question])])[0]
            said = ours.template.encode_responses(ours.tokenizer, [ours.template.response(reply)])[0]
            ids = torch.tensor([[*asked, *said][-context:]])
            wanted.append(ours.model(ids, torch.ones_like(ids, dtype=torch.bool)))
        scores = torch.cat(wanted)
        off = _distance(found, scores, _SCORES[self.dtype] * max(1.0, float(scores.abs().max())), "scores")
        same = torch.equal(found.argsort(), scores.argsort())
        return f"the scores of {len(texts)} padded rows within {off:.1g}, " + (
            "in the same order" if same else "in another order where they are nearly the same"
        )


@contextlib.contextmanager
def reading_back() -> Iterator[None]:
    """Whatever transformers raises inside means that the export is not the model: RunStopped."""
    try:
        with quiet_transformers(), torch.no_grad():
            yield
    except (RunStopped, UserError):
        raise
    except Exception as error:  # transformers raises many kinds
        raise _fault(f"{type(error).__name__}: {error}") from error


def read_model(auto: Any, folder: Path, **options: Any) -> Any:
    """A model by one of transformers' auto classes; RunStopped where tensors are missing or none of its."""
    # In fp32, where only the rounding of the weights is left of a smaller type.
    options = dict(dtype=torch.float32, local_files_only=True, output_loading_info=True) | options
    model, report = auto.from_pretrained(folder, **options)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        must(not report[what], f"the weights have {what.replace('_', ' ')}: {sorted(report[what])[:3]}")
    return model.eval()


def _distance(found: Tensor, wanted: Tensor, allowed: float, what: str) -> float:
    """The largest difference between two tensors of one shape; RunStopped where it is more than is allowed."""
    off = float((found - wanted).abs().max())
    must(off <= allowed, f"the {what} are off by {off:.2g}, where {allowed:.2g} is allowed")
    return off


def must(holds: bool, fault: str) -> None:
    """RunStopped with what is at fault, unless it holds."""
    if not holds:
        raise _fault(fault)


def _fault(fault: str) -> RunStopped:
    return RunStopped(f"the export is not the model: {fault[:300]}; nothing was left of it")


def _messages(turns: Sequence[str], system: str = "") -> list[dict[str, str]]:
    """Turns of user and assistant as chat messages."""
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
