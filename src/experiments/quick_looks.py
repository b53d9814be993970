"""The quick looks of experiments/main.py: one function per task, with the parser that its flags are added to.

A checkpoint is a run folder, a checkpoint folder or a run's name, from any stage. Colours (prompt dim, response
green, EOS reversed, PAD grey) appear on a terminal only, and not when NO_COLOR is set; what they tell is also written.

Shapes: B rows, L columns, P tokens of a prompt, T tokens of a response, K completions of one prompt.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config.devices import choose_device
from config.scrub import printable
from config.user_error import UserError
from experiments.graded_answers import text_model
from experiments.loss_example import loss_example
from inference.answers import Answer, Machine, TextModel, score_answers
from inference.systems import System, run_around, template_of
from models.generation import generate
from models.weights.checkpoint import describe
from models.weights.huggingface import describe_pretrained
from models.weights.pretrained import our_checkpoint, told_of
from utils.chat_templates import template_at_hand
from utils.data.batching import collate_ranked, collate_sft, left_pad
from utils.data.rows import STAGES
from utils.data.splits import SPLITS
from utils.dataset import load_dataset, open_source
from utils.demo.facts import world_in_a_line
from utils.runs.finding import find_checkpoint
from utils.runs.folder import typed_path
from utils.template import PromptTemplate
from utils.tokenizer import EOS_TEXT, Tokenizer, get_tokenizer, load_tokenizer
from utils.tokenizers.huggingface import has_tokenizer
from utils.tokenizers.interface import SAVED_FOLDER

# Of the demo's world, and what anybody may ask a larger model.
_PROMPT = "What is the capital of Italy?"
_TEXT = f"It's 10 o'clock, Zo\u00eb!\n\nHuman: does {EOS_TEXT} end this text?"

_DIM, _GREEN, _REVERSED, _GREY = "2", "32", "7", "90"


def look_at_gpt(parser: argparse.ArgumentParser, rest: list[str]) -> int:
    """Print prompts and what a language model makes of them."""
    text = "run (its folder or name) or checkpoint of a language model (SFT or PPO); a Hugging Face folder or hub name"
    parser.add_argument("-m", "--model", required=True, help=text)
    text = f"a question, or a dialogue that has 'Human:' in it; may be repeated (default: {_PROMPT!r})"
    parser.add_argument("--prompt", action="append", type=_utf8, help=text)
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it stands, without the template")
    text = "longest answer (default 64, or what the context leaves)"
    parser.add_argument("--max-new-tokens", type=_at_least(1), help=text)
    parser.add_argument("--temperature", type=_at_least(0.0), default=0.7, help="0 is greedy (default 0.7)")
    parser.add_argument("--top-k", type=_at_least(0), default=0, help="sample among the k likeliest ids; 0: all")
    parser.add_argument("--top-p", type=_share, default=1.0, help="sample among the likeliest ids of this mass; 1: all")
    parser.add_argument("--seed", type=_at_least(0), default=0)
    parser.add_argument("--count", type=_at_least(1), default=1, help="samples per prompt")
    _add_machine_flags(parser)
    flags = parser.parse_args(rest)

    from training.loop import row_seeds  # PPO's iterations count from 1, so purpose 0 is free

    source = load_language_model(flags.model, flags.runs_dir)
    tokenizer, context = source.tokenizer, source.context
    texts = [_prompt_text(text, source.template, flags.raw) for text in flags.prompt or [_PROMPT]]
    prompts = tokenizer.encode_batch(texts) if flags.raw else source.template.encode_prompts(tokenizer, texts)
    longest = max(map(len, prompts))
    room = max(0, context - longest)
    if not room:
        raise UserError(f"--prompt: its {longest} tokens leave no room in the context of {context}; give a shorter one")
    limit = flags.max_new_tokens or min(64, room)
    if limit > room:
        raise UserError(
            f"--max-new-tokens {limit}: with a prompt of {longest} tokens at most {room} fit the context of {context}"
        )
    if tokenizer.kind == "demo" and _trained_on_demo(find_checkpoint(flags.model, flags.runs_dir, "-m")):
        print(f"note: {world_in_a_line()}", file=sys.stderr)
    rows = [prompt for prompt in prompts for _ in range(flags.count)]
    generation = generate(
        source.model.to(choose_device(flags.device)), rows, max_new_tokens=limit, eos_id=tokenizer.ends,
        pad_id=tokenizer.pad_id, temperature=flags.temperature, top_k=flags.top_k, top_p=flags.top_p,
        seeds=row_seeds(flags.seed, 0, len(rows)),
    )  # fmt: skip
    for i, (text, prompt) in enumerate(zip(texts, prompts)):
        print(f"== prompt {i + 1}: {len(prompt)} tokens\n{_paint(text.strip(), _DIM)}")
        for k in range(flags.count):
            b = i * flags.count + k
            ended = "ended" if generation.ended[b] else f"cut at {limit}"
            print(f"-- sample {k + 1}: {int(generation.n[b])} tokens, {ended}")
            print(_paint(tokenizer.decode(generation.row(b)).strip(), _GREEN))
    return 0


def _trained_on_demo(checkpoint: Path) -> bool:
    """Whether a model with the demo's vocabulary knows the demo's world, and not data of the user's own."""
    dataset = run_around(checkpoint)[1].get("config", {}).get("dataset", "demo")
    return dataset in ("demo", "demo-text")


def load_language_model(argument: str, runs_dir: str) -> TextModel:
    """A language model of ours, or one in Hugging Face's form, with its tokenizer and template.

    UserError where there is no such model, or it is a critic or a reward model.
    """
    checkpoint = our_checkpoint(argument, runs_dir, "-m")
    if checkpoint is not None:
        return text_model(checkpoint)
    return System("model", "huggingface", argument, f"-m {argument}").load()


def _prompt_text(text: str, template: PromptTemplate, raw: bool = False) -> str:
    if raw and text:
        return text
    try:
        return template.prompt(text)
    except ValueError as error:
        raise UserError(f"--prompt: {error}") from None


def look_at_reward(parser: argparse.ArgumentParser, rest: list[str]) -> int:
    """Print the scores of responses to a prompt, best first, and the token each is read at."""
    parser.add_argument("-m", "--model", required=True, help="run (its folder or name) or checkpoint of a reward model")
    parser.add_argument("--prompt", required=True, type=_utf8, help="a question, or a dialogue that has 'Human:' in it")
    parser.add_argument("--response", action="append", required=True, type=_utf8, help="an answer; may be repeated")
    parser.add_argument("--no-eos", action="store_true", help="score the answers as if they had been cut short")
    _add_machine_flags(parser)
    flags = parser.parse_args(rest)
    folder = find_checkpoint(flags.model, flags.runs_dir, "-m")
    description = describe(folder)
    if description["role"] != "reward":
        raise UserError(f"-m {flags.model}: {folder} holds no reward model; give a run of train_rm.py")
    source = text_model(folder, "reward")
    tokenizer, context = source.tokenizer, source.context
    asked = _prompt_text(flags.prompt, source.template)
    prompt = source.template.encode_prompts(tokenizer, [asked])[0]
    answers = []
    for text in flags.response:
        response = source.template.encode_responses(tokenizer, [source.template.response(text)])[0]
        response = response[:-1] if flags.no_eos else response
        length = len(prompt) + len(response)
        if not response:
            raise UserError("--response: is empty, and with --no-eos there is nothing to score")
        if length > context:
            told = f"with the prompt it has {length} tokens, the context is {context}"
            raise UserError(f"--response: {told}; shorten one of them")
        answers.append(Answer(flags.prompt, text.strip(), np.array(prompt), np.array(response)))
    scores = score_answers(source, answers, Machine(choose_device(flags.device)), "reward", own_ids=True)
    is_normalised = (description.get("normalised") or {}).get("step") == description.get("step")
    scale = "SFT samples had mean 0 and deviation 1" if is_normalised else "not normalised after its last step"
    print(f"{folder}: {scale}")
    print(_paint(asked.strip(), _DIM))
    for score, answer in sorted(zip(scores, answers), key=lambda item: -item[0]):
        last = int(answer.ids[-1])
        token = "EOS" if last == tokenizer.eos_id else repr(tokenizer.decode([last]))
        where = f"{answer.tokens} tokens, read at column {len(prompt) + answer.tokens - 1} ({token})"
        print(f"{score:+8.3f}  {_paint(answer.text, _GREEN)}  [{where}]")
    return 0


def look_at_dataset(parser: argparse.ArgumentParser, rest: list[str]) -> int:
    """Print the first rows of a data set as the batch that a training script would make of them."""
    parser.add_argument("--dataset", default="demo", help="a name, hub:OWNER/NAME, or the path of a file")
    parser.add_argument("--stage", default="sft", choices=STAGES, help="what the rows are read for")
    parser.add_argument("--split", default="train", choices=SPLITS)
    text = "gpt2, demo, a run or checkpoint, or a Hugging Face folder or hub name (default: the demo's own, else gpt2)"
    parser.add_argument("--tokenizer", default="auto", help=text)
    parser.add_argument("--rows", type=_at_least(1), default=3, help="rows of the batch to show (default 3)")
    text = "longest row in tokens (default: 192 with the demo's tokenizer, else 1024, as the models have it)"
    parser.add_argument("--max-length", type=_at_least(0), default=0, help=text)
    parser.add_argument("--skip-bad-rows", action="store_true", help="count malformed rows instead of stopping")
    parser.add_argument("--runs-dir", default="runs", help="where runs are looked for")
    flags = parser.parse_args(rest)
    stage = "text" if flags.dataset == "demo-text" else flags.stage
    open_source(flags.dataset, stage)  # a name that is wrong is told before a tokenizer is looked for
    own = "demo" if flags.dataset in ("demo", "demo-text") else "gpt2"
    tokenizer, template = tokenizer_and_template(own if flags.tokenizer == "auto" else flags.tokenizer, flags.runs_dir)
    limit = flags.max_length or (192 if tokenizer.kind == "demo" else 1024)
    options = {"skip_bad_rows": flags.skip_bad_rows, "template": template}
    data = load_dataset(flags.dataset, stage, flags.split, tokenizer, limit, **options)
    print(data.report.summary())
    examples = [data[i] for i in range(min(flags.rows, len(data)))]
    names = [f"{'prompt' if stage == 'ppo' else 'row'} {i}" for i in range(len(examples))]
    if stage == "ppo":
        ids, att = left_pad(examples, tokenizer.pad_id)
        starts = [ids.shape[1]] * len(examples)  # the response would start behind the last column
    else:
        ranked = stage == "rm"
        batch = collate_ranked(examples, tokenizer.pad_id).rows if ranked else collate_sft(examples, tokenizer.pad_id)
        ids, att, starts = batch.ids, batch.att, batch.prompt_len.tolist()
    if stage == "rm":
        names = [f"row {i} rank {k + 1}" for i, e in enumerate(examples) for k in range(len(e.response_ids))]
    B, L = ids.shape
    print(f"batch [{B}, {L}], {1 - float(att.float().mean()):.0%} of it padding; {_LEGEND}")
    for name, row, real, start in zip(names, ids, att, starts):
        total = int(real.sum())
        inside = f"{start} prompt + {total - start} response" if stage != "ppo" else "all prompt"
        use = {"rm": f"scored at column {total - 1}", "ppo": "answered from the last column"}.get(
            stage, f"trained on columns {max(start, 1)} to {total - 1}"  # nothing predicts a row's first token
        )  # fmt: skip
        print(f"\n{name}: {total} tokens ({inside}), {L - total} padding; {use}")
        print(render_row(row, real, start, tokenizer))
    return 0


_LEGEND = "shown as prompt|response[EOS][PAD x count]"


def render_row(ids: Tensor, att: Tensor, start: int, tokenizer: Tokenizer) -> str:
    r"""One row of a batch as a line of text, line breaks as \n; every token is shown in its place and nothing else.

    Args:
        ids: [L] int64. att: [L] bool, real tokens; the padding is on one side.
        start: column in which the response starts. tokenizer: of the ids.
    """
    is_response = torch.arange(len(ids)) >= start

    def text(wanted: Tensor, style: str) -> str:
        row = ids[wanted & att]
        ends = (row == tokenizer.eos_id).nonzero().flatten().tolist()
        pieces = torch.tensor_split(row, [end + 1 for end in ends])
        texts = [tokenizer.decode(piece).replace("\n", "\\n") for piece in pieces]
        return _paint("[EOS]", _REVERSED).join(text and _paint(text, style) for text in texts)

    padding = int((~att).sum())
    pad = _paint(f"[PAD x {padding}]", _GREY) if padding else ""
    response = text(is_response, _GREEN) if start < len(ids) else ""
    line = f"{text(~is_response, _DIM)}|{response}"
    return pad + line if padding and not att[0] else line + pad


def look_at_tokenizer(parser: argparse.ArgumentParser, rest: list[str]) -> int:
    """Print the tokens of a text with their ids, whether it comes back unchanged, and where EOS and PAD are."""
    text = "gpt2, demo (default), a run or checkpoint, or a Hugging Face folder or hub name"
    parser.add_argument("--tokenizer", default="demo", help=text)
    parser.add_argument("--text", default=_TEXT, type=_utf8, help="what to cut")
    parser.add_argument("--runs-dir", default="runs", help="where runs are looked for")
    flags = parser.parse_args(rest)
    tokenizer = find_tokenizer(flags.tokenizer, flags.runs_dir)
    identity = tokenizer.identity()
    print(f"{identity['name']} ({identity['kind']}), sha256 {identity['sha256'][:12]}")
    print(f"{tokenizer.vocab_size} ids; EOS is {tokenizer.eos_id}; PAD is {tokenizer.pad_id}, outside every table")
    ids = tokenizer.encode(flags.text)
    print(f"{len(flags.text)} characters, {len(ids)} tokens:")
    for i in ids:
        piece = tokenizer.decode([i])
        print(f"  {i:>6}  {'part of a character' if chr(0xFFFD) in piece else ascii(piece)}")
    back = tokenizer.decode(ids)
    print("round trip: " + ("the same text" if back == flags.text else f"DIFFERENT: {ascii(back)}"))
    if EOS_TEXT in flags.text:
        print(f"{EOS_TEXT} in the text is plain text: EOS is {'' if tokenizer.eos_id in ids else 'not '}among the ids")
    return 0


def find_tokenizer(argument: str, runs_dir: str) -> Tokenizer:
    """A tokenizer by name or folder, or that of a run or checkpoint; UserError where there is none of that name."""
    return tokenizer_and_template(argument, runs_dir)[0]


def tokenizer_and_template(argument: str, runs_dir: str) -> tuple[Tokenizer, PromptTemplate]:
    """`find_tokenizer`, and the template of the model that it is of."""
    if argument in ("gpt2", "demo"):
        return get_tokenizer(argument), PromptTemplate()
    folder = typed_path(argument)
    is_tokenizer = has_tokenizer(folder) or (folder / SAVED_FOLDER).exists()
    if is_tokenizer and not (folder / "model.json").is_file():
        return _with_template(get_tokenizer(folder))
    try:
        checkpoint = our_checkpoint(argument, runs_dir, "--tokenizer")
    except UserError as error:
        if folder.is_dir():
            raise
        raise UserError(f"{error}; gpt2 and demo are known by name") from None
    if checkpoint is not None:
        return load_tokenizer(checkpoint), template_of(checkpoint, f"--tokenizer {argument}")
    if not folder.is_dir():
        return _with_template(get_tokenizer(argument))
    with told_of(f"--tokenizer {argument}", argument):
        tokenizer, note = describe_pretrained(argument).tokenizer(f"--tokenizer {argument}")
    print(note or f"{argument}: the tokenizer of its base model")
    return _with_template(tokenizer)


def _with_template(tokenizer: Tokenizer) -> tuple[Tokenizer, PromptTemplate]:
    """A tokenizer in Hugging Face's form as its model is asked, and how."""
    template, tokenizer, note = template_at_hand(tokenizer)
    if note:
        print(note)
    return tokenizer, template


def look_at_loss(parser: argparse.ArgumentParser, rest: list[str]) -> int:
    """Print the worked example of the losses."""
    parser.parse_args(rest)
    print("\n".join(loss_example()))
    return 0


def _at_least(low: int | float) -> Callable[[str], int | float]:
    """A type for argparse: a number of the kind of `low`, finite and not below it."""
    kind = type(low)

    def parse(text: str) -> int | float:
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number of {low} or more")
        return value

    parse.__name__ = kind.__name__  # argparse puts it into its message
    return parse


def _utf8(word: str) -> str:
    """A text from the command line, where bytes that are no UTF-8 arrive as halves of surrogate pairs."""
    try:
        word.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{ascii(word)[:60]} is not UTF-8 text") from None
    return word


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


_share.__name__ = "float"


def _add_machine_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--runs-dir", default="runs", help="where runs are looked for")


def _paint(text: str, style: str) -> str:
    """Text in an ANSI style where colours are wanted (https://no-color.org); its own control characters are shown."""
    text = printable(text)
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\033[{style}m{text}\033[0m"
