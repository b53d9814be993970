"""Answers of systems to prompts, and what is said of a system apart from any comparison.

An answer is sampled (or decoded greedily) by a language model, is the best of n samples of the SFT model by the reward
model, or was made elsewhere and is read from a file. All that is measured on token ids is measured on the ids that were
sampled, never on a text that was tokenised again; only texts from files have to be.

Shapes: N prompts, B rows of a batch, L columns, n samples of one prompt.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from config.devices import TORCH_TYPE, choose_device, choose_dtype, describe_device, sum_in_full_precision
from config.user_error import UserError
from models.generation import generate
from models.weights.checkpoint import weights_digest
from utils.data.batching import collate_sft
from utils.data.examples import SFTExample
from utils.data.files import read_jsonl
from utils.data.rows import BadRow, parse_row
from utils.loss import target_mask
from utils.metrics import correlation, text_degeneracy
from utils.template import PromptTemplate
from utils.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answer:
    """One answer to one prompt.

    prompt: in the template's form. text: without end mark and without white space around it. prompt_ids, ids: tokens of
    the prompt as the model saw it and of the answer, EOS included. ended: whether the model stopped by itself. The last
    three are None for a text from a file.
    """

    prompt: str
    text: str
    prompt_ids: np.ndarray | None = None
    ids: np.ndarray | None = None
    ended: bool | None = None

    @property
    def tokens(self) -> int | None:
        """Tokens of the answer, EOS included."""
        return None if self.ids is None else len(self.ids)


@dataclass(frozen=True)
class TextModel:
    """A model with what it needs to read and write text: a language model, or a reward model."""

    model: nn.Module
    tokenizer: Tokenizer
    template: PromptTemplate

    @property
    def context(self) -> int:
        """Longest row in tokens."""
        return self.model.config.block_size

    @cached_property
    def digest(self) -> str:
        """`weights_digest` of the model as it is when first asked for; reading a large one takes seconds."""
        return weights_digest(self.model)

    def same_tokens(self, other: TextModel) -> bool:
        """Whether the same ids are the same dialogue to both."""
        own, others = self.tokenizer.identity(), other.tokenizer.identity()
        return self.template == other.template and all(own[key] == others[key] for key in ("sha256", "eos_id"))


@dataclass(frozen=True)
class Machine:
    """Where models run: `batch_size` rows at once; `autocast()` is the context of forward passes, in `dtype`."""

    device: torch.device | str = "cpu"
    batch_size: int = 32
    autocast: Callable[[], AbstractContextManager] = nullcontext
    dtype: str = "fp32"

    @classmethod
    def chosen(cls, device: str, dtype: str, batch_size: int, seed: int) -> Self:
        """What --device, --dtype and --seed ask for; the seed is that of all random numbers of the process.

        UserError as `choose_device` and `choose_dtype` raise it.
        """
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)
        for seed_one in (random.seed, np.random.seed, torch.manual_seed):
            seed_one(seed)
        sum_in_full_precision()
        autocast = nullcontext if dtype == "fp32" else partial(torch.autocast, device, TORCH_TYPE[dtype])
        return cls(torch.device(device), batch_size, autocast, dtype)

    def describe(self) -> str:
        """One line for the record."""
        return describe_device(self.device, self.dtype)


@dataclass(frozen=True)
class Sampling:
    """How answers are made; temperature 0 is greedy."""

    temperature: float
    max_new_tokens: int
    seed: int = 0


def prompt_tokens(source: TextModel, prompts: Sequence[str], max_new_tokens: int) -> tuple[list[np.ndarray], int]:
    """Token ids of prompts, each with room for an answer behind it, and how many had to lose their beginning.

    UserError where the answer alone fills the context.
    """
    room = source.context - max_new_tokens
    if room < 1:
        raise UserError(
            f"--max-new-tokens {max_new_tokens}: the context is {source.context} tokens, prompt included; give fewer"
        )
    rows = [np.array(ids) for ids in source.template.encode_prompts(source.tokenizer, list(prompts))]
    return [ids[-room:] for ids in rows], sum(len(ids) > room for ids in rows)


def sample_answers(
    source: TextModel, prompts: Sequence[str], name: str, sampling: Sampling, machine: Machine, draw: int = 0
) -> list[Answer]:
    """One answer of a language model to every prompt.

    Args:
        source: the language model; it is moved to the machine.
        prompts: in the template's form [N].
        name: of the system. With the seed, the prompt's place and `draw` it decides the random numbers, so that two
            systems are sampled independently, and the first prompts of a longer list get the same answers.
        draw: 0, 1, ... for several independent answers to each prompt.
    """
    rows, _ = prompt_tokens(source, prompts, sampling.max_new_tokens)
    numbers = np.random.SeedSequence([sampling.seed, zlib.crc32(name.encode()), draw])
    seeds = numbers.generate_state(len(rows), np.uint64).astype(np.int64).tolist()
    model = source.model.to(machine.device).eval()
    answers: list[Answer | None] = [None] * len(rows)
    for part in _parts([len(ids) for ids in rows], machine.batch_size, f"{name}: answers"):
        with machine.autocast():
            generation = generate(
                model, [rows[i] for i in part], max_new_tokens=sampling.max_new_tokens,
                eos_id=source.tokenizer.ends, pad_id=source.tokenizer.pad_id, temperature=sampling.temperature,
                seeds=[seeds[i] for i in part],
            )  # fmt: skip
        for b, i in enumerate(part):
            ids = generation.row(b).cpu().numpy()
            text = source.tokenizer.decode(ids).strip()
            answers[i] = Answer(prompts[i], text, rows[i], ids, bool(generation.ended[b]))
    return answers


def read_answers(path: Path, prompts: Sequence[str], template: PromptTemplate, flag: str) -> list[Answer]:
    """Answers made elsewhere: rows {"prompt", "response"} of a JSON Lines file, matched to the prompts by their text.

    Raises:
        UserError: the file cannot be read, a row is malformed, a prompt has none or two different answers.
    """
    found: dict[str, str] = {}
    for number, data in read_jsonl(path):
        where = f"{path}:{number}"
        if isinstance(data, BadRow):
            raise data
        prompt = parse_row(data, "ppo", where, template).prompts[0]
        response = data.get("response")
        if not isinstance(response, str):
            raise UserError(f'{where}: has no text as "response"; a row is {{"prompt": ..., "response": ...}}')
        response = template.response(response).strip()
        if found.setdefault(prompt, response) != response:
            raise UserError(f"{where}: a second, different answer to a prompt of this file; keep one")
    missing = [" ".join(prompt.split()) for prompt in prompts if prompt not in found]
    if missing:
        first = missing[0] if len(missing[0]) <= 60 else missing[0][:60] + " ..."
        raise UserError(
            f"{flag}: {path} has no answer to {len(missing)} of the {len(prompts)} prompts, the first of them "
            f'"{first}"; add them, or ask fewer with --prompts or --limit'
        )
    return [Answer(prompt, found[prompt]) for prompt in prompts]


def best_of(samples: Sequence[Sequence[Answer]], proxy: np.ndarray, n: int) -> list[Answer]:
    """Of the first n samples of each prompt the one that the reward model scores highest.

    Args:
        samples: draws of N answers each. proxy: [draws, N] their scores.
    """
    return [samples[k][i] for i, k in enumerate(proxy[:n].argmax(0))]


@torch.no_grad()
def answer_logprobs(
    model: nn.Module, answers: Sequence[Answer], pad_id: int, temperature: float, machine: Machine, name: str
) -> np.ndarray:
    """Log-probability of each whole answer, EOS included, at the sampling temperature: [N] nats."""
    model = model.to(machine.device).eval()
    sums = np.zeros(len(answers))
    lengths = [len(a.prompt_ids) + len(a.ids) for a in answers]
    for part in _parts(lengths, machine.batch_size, f"{name}: log-probabilities"):
        examples = [SFTExample(answers[i].prompt_ids, answers[i].ids) for i in part]
        batch = collate_sft(examples, pad_id).to(machine.device)
        L = batch.ids.shape[1]
        row, column = target_mask(batch.prompt_len, batch.length, L).nonzero(as_tuple=True)  # where tokens were chosen
        with machine.autocast():
            states = model.hidden(batch.ids, batch.att, right_padded=True, at=row * L + column)
            logp = model.token_logprobs(states, batch.ids[row, column + 1], temperature)
        np.add.at(sums, part[row.cpu().numpy()], logp.double().cpu().numpy())
    return sums


def kl_to_sft(
    policy: TextModel, sft: TextModel, answers: Sequence[Answer], temperature: float, machine: Machine, name: str
) -> np.ndarray | None:
    """log pi - log pi_SFT of every answer at the sampling temperature: [N] nats, whose mean estimates the KL (k1).

    None where it is not defined: greedy answers have no distribution, and models with different tokenizers none in
    common.
    """
    if temperature == 0 or not policy.same_tokens(sft) or policy.context != sft.context:
        return None
    if policy.model is sft.model:
        return np.zeros(len(answers))
    models = (policy.model, sft.model)
    own, reference = (answer_logprobs(m, answers, sft.tokenizer.pad_id, temperature, machine, name) for m in models)
    return own - reference


@torch.no_grad()
def score_answers(rm: TextModel, answers: Sequence[Answer], machine: Machine, name: str, own_ids: bool) -> np.ndarray:
    """The reward model's scores of answers: [N].

    Args:
        own_ids: score the ids that were sampled (with an EOS if the model wrote one); otherwise the texts, each with an
            EOS behind it: for answers of another tokenizer, and where a judge must not see who was cut.
    """
    if own_ids:
        rows = [(a.prompt_ids, a.ids) for a in answers]
    else:  # as training joins texts: tokenised apart, an EOS behind
        asked = rm.template.encode_prompts(rm.tokenizer, [rm.template.prompt(a.prompt) for a in answers])
        said = rm.template.encode_responses(rm.tokenizer, [rm.template.response(a.text) for a in answers])
        rows = [(np.array(p), np.array(r)) for p, r in zip(asked, said, strict=True)]
    # The prompt of a long row loses its beginning, and an answer that fills the context alone its end.
    rows = [(prompt, ids[: rm.context - 1]) for prompt, ids in rows]
    examples = [SFTExample(prompt[-(rm.context - len(ids)) :], ids) for prompt, ids in rows]
    model = rm.model.to(machine.device).eval()
    scores = np.zeros(len(examples))
    lengths = [len(e.prompt_ids) + len(e.response_ids) for e in examples]
    for part in _parts(lengths, machine.batch_size, f"{name}: reward model"):
        batch = collate_sft([examples[i] for i in part], rm.tokenizer.pad_id).to(machine.device)
        with machine.autocast():
            scores[part] = model(batch.ids, batch.att, right_padded=True).float().cpu().numpy()
    return scores


def score_texts(rm: TextModel, machine: Machine) -> Callable[[Sequence[str], Sequence[str]], list[float]]:
    """The reward model as a function (prompts, answers) -> scores, for a judge that sees texts only."""

    def score(prompts: Sequence[str], texts: Sequence[str]) -> list[float]:
        answers = [Answer(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        return score_answers(rm, answers, machine, "judge", own_ids=False).tolist()

    return score


def system_figures(
    answers: Sequence[Answer], kl: np.ndarray | None = None, proxy: np.ndarray | None = None,
    gold: np.ndarray | None = None,
) -> dict[str, float | int | None]:  # fmt: skip
    """What evaluation.json says of a system; None where a figure does not exist.

    Args:
        answers: [N]. kl: [N] log-ratios to the SFT model. proxy, gold: [N] rewards.

    Returns:
        n; eos_rate; distinct_2, repetition (4-grams), duplicate_rate over words; empty_rate; mean_length in words;
        mean_tokens, EOS included; kl with its standard error; mean proxy and gold; their Pearson correlation over
        prompts.
    """
    words = [answer.text.split() for answer in answers]
    sampled = answers[0].ids is not None
    correlated = proxy is not None and gold is not None
    figures = {
        "n": len(answers),
        "eos_rate": _mean([a.ended for a in answers]) if sampled else None,
        **text_degeneracy(words),
        "empty_rate": _mean([not w for w in words]),
        "mean_length": _mean([len(w) for w in words]),
        "mean_tokens": _mean([a.tokens for a in answers]) if sampled else None,
        "kl": _mean(kl),
        "kl_se": None if kl is None or len(kl) < 2 else float(kl.std(ddof=1) / np.sqrt(len(kl))),
        "proxy": _mean(proxy),
        "gold": _mean(gold),
        "proxy_gold_correlation": correlation(torch.tensor(proxy), torch.tensor(gold)) if correlated else None,
    }
    return {key: None if value != value else value for key, value in figures.items()}


def _mean(values: Sequence[float] | np.ndarray | None) -> float | None:
    return None if values is None else float(np.mean(values))


def _parts(lengths: Sequence[int], batch_size: int, description: str) -> Iterator[np.ndarray]:
    """Indices of rows to run together: like lengths, the longest first, under a progress bar that counts rows."""
    order = np.argsort([-n for n in lengths], kind="stable")
    with tqdm(total=len(order), desc=description, leave=False, delay=1, disable=None) as bar:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            yield part
            bar.update(len(part))
