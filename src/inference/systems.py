"""Which systems an evaluation compares, found and checked before anything is loaded.

A system is a checkpoint of ours, a model in Hugging Face's form, the best of n samples of the SFT model, or a file of
answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from config.user_error import UserError
from inference.answers import TextModel
from models.families import load_checkpoint, load_pretrained
from models.weights.checkpoint import describe
from models.weights.huggingface import describe_pretrained
from models.weights.pretrained import our_checkpoint, told_of
from utils.chat_templates import template_at_hand
from utils.runs.finding import find_checkpoint
from utils.runs.folder import typed_path
from utils.runs.origins import find_origin
from utils.template import PromptTemplate
from utils.tokenizer import Tokenizer, load_tokenizer

_NAME = re.compile(r"\w[\w.-]*")
_SCRIPT = {"sft": "train_sft.py", "rm": "train_rm.py", "ppo": "train_ppo.py"}
_HOLDS = {"sft": "an SFT model", "rm": "a reward model", "ppo": "a PPO policy"}


@dataclass(frozen=True)
class System:
    """Something that answers prompts.

    name: in tables and in evaluation.json. kind: where answers come from. source: a checkpoint folder, a Hugging Face
    folder or name, or a file; of best-of-n the SFT checkpoint. flag: what named it, for messages. n: of best-of-n.
    """

    name: str
    kind: Literal["checkpoint", "huggingface", "best_of_n", "file"]
    source: str
    flag: str
    n: int = 1

    def describe(self) -> dict[str, Any]:
        """For evaluation.json."""
        return {"kind": self.kind, "source": self.source} | ({"of": self.n} if self.kind == "best_of_n" else {})

    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer; None for a file."""
        if self.kind == "file":
            return None
        return self._pretrained[0] if self.kind == "huggingface" else load_tokenizer(self.source)

    @property
    def of_demo(self) -> bool:
        """Whether it knows the demo's words only."""
        tokenizer = self.tokenizer()
        return tokenizer is not None and tokenizer.identity()["kind"] == "demo"

    def template(self) -> PromptTemplate | None:
        """The prompt template it was trained with; None for a file."""
        if self.kind == "file":
            return None
        return self._pretrained[1] if self.kind == "huggingface" else template_of(Path(self.source), self.flag)

    def load(self) -> TextModel:
        """The language model behind it; UserError where it cannot be loaded."""
        tokenizer, template = self.tokenizer(), self.template()
        if self.kind != "huggingface":
            return TextModel(load_checkpoint(self.source).eval(), tokenizer, template)
        print("".join(f"{line}\n" for line in self._pretrained[2:] if line), end="")
        with told_of(self.flag, self.source):
            model = load_pretrained(self.source, vocab_size=tokenizer.vocab_size)
        return TextModel(model.eval(), tokenizer, template)

    @cached_property
    def _pretrained(self) -> tuple[Tokenizer, PromptTemplate, str, str, str]:
        """Of a Hugging Face model: its tokenizer and template, and what is to be told about the model and these two."""
        with told_of(self.flag, self.source):
            found = describe_pretrained(self.source)
            tokenizer, note = found.tokenizer(self.flag)
        template, tokenizer, unread = template_at_hand(tokenizer)
        return tokenizer, template, found.note, note, unread


def find_systems(
    sft: str, ppo: str, vanilla: str, best_of: Sequence[int], others: Sequence[str], runs_dir: str
) -> list[System]:
    """The systems that the flags name: vanilla, sft, best_of_*, ppo, then the others as given.

    Args:
        sft, ppo, vanilla: -s, -p and -v; "" where not given.
        best_of: numbers of --best-of. others: NAME=SOURCE of each --system.

    Raises:
        UserError: something is not there or of another stage, two systems have one name, or there are fewer than two.
    """
    systems = []
    if vanilla:
        systems.append(_model("vanilla", vanilla, f"-v {vanilla}", runs_dir, ("sft",), huggingface=True))
    if sft:
        systems.append(_model("sft", sft, f"-s {sft}", runs_dir, ("sft",)))
    if best_of and not sft:
        raise UserError("--best-of: samples from the SFT model; name it with -s")
    source = systems[-1].source if sft else ""
    systems += [System(f"best_of_{n}", "best_of_n", source, "--best-of", n) for n in sorted(best_of)]
    if ppo:
        systems.append(_model("ppo", ppo, f"-p {ppo}", runs_dir, ("ppo",)))
    systems += [_other(spec, runs_dir) for spec in others]
    names = [system.name for system in systems]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"--system {twice}=...: there are two systems called {twice}; choose another name")
    if len(systems) < 2:
        raise UserError(
            "two systems are needed to compare: for instance -s SFT -p PPO, or --system NAME=CHECKPOINT twice"
        )
    return systems


def _other(spec: str, runs_dir: str) -> System:
    """What a --system flag names."""
    name, equals, source = spec.partition("=")
    flag = f"--system {spec}"
    if not equals or not source or not _NAME.fullmatch(name):
        raise UserError(
            f"{flag}: give NAME=CHECKPOINT or NAME=FILE.jsonl, with letters, digits, '.', '_' or '-' as name"
        )
    if source.endswith((".jsonl", ".jsonl.gz")):
        if not typed_path(source).is_file():
            raise UserError(f'{flag}: no such file; give a JSON Lines file of rows {{"prompt": ..., "response": ...}}')
        return System(name, "file", str(typed_path(source)), flag)
    return _model(name, source, flag, runs_dir, ("sft", "ppo"), huggingface=True)


def _model(
    name: str, argument: str, flag: str, runs_dir: str, stages: tuple[str, ...], huggingface: bool = False
) -> System:
    """A system from a model argument; one of `stages`, or one in Hugging Face's form if allowed."""
    checkpoint = our_checkpoint(argument, runs_dir, flag.split()[0])
    if checkpoint is None and huggingface:
        return System(name, "huggingface", argument, flag)
    if checkpoint is None:
        raise UserError(f"{flag}: is a model in Hugging Face's form; give it as -v, or as --system NAME={argument}")
    check_stage(checkpoint, flag, stages)
    return System(name, "checkpoint", str(checkpoint), flag)


def check_stage(checkpoint: Path, flag: str, stages: tuple[str, ...]) -> None:
    """Refuse a checkpoint of another stage: a UserError says what it holds, and which script makes what is needed."""
    description = describe(checkpoint)
    stage, role = description.get("stage"), description["role"]
    held = "a critic" if role == "critic" else _HOLDS.get(stage, f"a model of stage {stage}")
    if stage not in stages or role != ("reward" if stage == "rm" else "lm"):
        scripts = " or ".join(_SCRIPT[wanted] for wanted in stages)
        raise UserError(f"{flag}: holds {held}; give a run of {scripts}")


def template_of(checkpoint: Path, flag: str) -> PromptTemplate:
    """The template saved with a checkpoint; UserError where there is none."""
    try:
        return PromptTemplate.from_dict(describe(checkpoint)["template"])
    except (KeyError, ValueError):
        raise UserError(f"{flag}: its model.json names no prompt template; give a checkpoint of our stages") from None


def common_template(systems: Sequence[System]) -> PromptTemplate:
    """The template for the texts of all systems; what each of them reads of it is its own.

    UserError where the texts differ: in different forms they would answer different prompts.
    """
    found = {system.name: template for system in systems if (template := system.template()) is not None}
    texts = {name: replace(template, marks=None) for name, template in found.items()}
    first = next(iter(texts.values()), PromptTemplate())
    other = next((name for name, template in texts.items() if template != first), None)
    if other:
        raise UserError(
            f"{next(iter(found))} and {other} were trained with different prompt templates; compare answers that each "
            "gave in its own form, with --system NAME=FILE.jsonl"
        )
    return next((template for template in found.values() if template.marks is not None), first)


def run_around(checkpoint: Path) -> tuple[Path, dict[str, Any]]:
    """The run that a checkpoint lies in and its hyperparams.json; itself and {} when it has been copied out of it."""
    for folder in (checkpoint, *checkpoint.parents[:2]):
        try:
            return folder, json.loads((folder / "hyperparams.json").read_text())
        except (OSError, ValueError):
            continue
    return checkpoint, {}


def find_reward_model(argument: str, ppo: System | None, runs_dir: str) -> tuple[Path | None, str]:
    """The reward model's checkpoint and a line on where it comes from: -c, or the one that the PPO run names.

    The one that a run names is found again after runs were moved, see `utils.runs.origins`. UserError where -c names no
    reward model.
    """
    if argument:
        checkpoint = find_checkpoint(argument, runs_dir, "-c")
        check_stage(checkpoint, f"-c {argument}", ("rm",))
        return checkpoint, f"reward model: {checkpoint}"
    run, record = run_around(Path(ppo.source)) if ppo is not None else (Path(), {})
    try:
        checkpoint = find_origin(record, "rm", run, runs_dir, "the PPO run")
    except UserError as error:
        return None, f"reward model: none ({error}); name one with -c"
    if checkpoint is None:
        return None, "reward model: none (name one with -c to see proxy scores)"
    return checkpoint, f"reward model: {checkpoint}, the one that the PPO run was trained with"


def load_reward_model(checkpoint: Path, flag: str) -> TextModel:
    """A reward model with its tokenizer and template."""
    model = load_checkpoint(checkpoint, "reward").eval()
    return TextModel(model, load_tokenizer(checkpoint), template_of(checkpoint, flag))
