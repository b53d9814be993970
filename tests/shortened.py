"""What makes the documented commands quick and local: fewer steps, a hub of small things, and nothing else.

The commands themselves stay as they are written; see tests/test_commands.py.
"""

from __future__ import annotations

import gzip
import importlib
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

_LIMITS = {
    "max_steps": 2, "epochs": 1, "iterations": 2, "batch_size": 4, "global_batch_size": 8, "eval_examples": 8,
    "eval_every": 1, "save_every": 1, "normalise_prompts": 8, "response_length": 8, "sample_tokens": 8,
    "minibatches": 2,
}  # fmt: skip
_HEAVY = (
    "torch", "numpy", "transformers", "datasets", "accelerate", "tensorboard.summary", "matplotlib.figure", "openai",
    "transformers.models.gpt2.modeling_gpt2", "tokenizers",
)  # fmt: skip


def prepare() -> None:
    """Import the packages that scripts need, and put the stand-ins in place; every script reads src/ anew."""
    for name in _HEAVY:
        importlib.import_module(name)
    import datasets
    import torch

    from config import command_line
    from training.memory import device

    torch.set_num_threads(1)
    parse = command_line.parse_cli
    command_line.parse_cli = lambda *args, **options: shortened(parse(*args, **options))
    datasets.load_dataset = load_dataset
    # The small model of the hub has GPT-2 medium's name, and is planned for as such.
    device.free_bytes = lambda: 64e9
    device.control_group_bytes = lambda: None


def shortened(config: Any) -> Any:
    """The same run, with a few small steps."""
    there = {field.name: getattr(config, field.name) for field in fields(config)}
    limits = {name: min(there[name] or limit, limit) for name, limit in _LIMITS.items() if name in there}
    return replace(config, **limits)


def load_dataset(repository: str, split: str) -> Any:
    """The hub's datasets that the project names, with a few rows in place of their own."""
    from datasets import Dataset

    rows = _pairs(split)
    if repository == "Anthropic/hh-rlhf":
        return Dataset.from_list(rows)
    assert repository in ("Dahoas/rm-static", "Dahoas/sft-static"), repository
    return Dataset.from_list([_static(row) for row in rows[::2]])


def _pairs(split: str) -> list[dict[str, str]]:
    first = {"train": 0, "test": 300}[split]
    return [
        {
            "chosen": f"\n\nHuman: How much is {i} and {i}?\n\nAssistant: It is {2 * i}.",
            "rejected": f"\n\nHuman: How much is {i} and {i}?\n\nAssistant: I do not know.",
        }
        for i in range(first, first + 300)
    ]


def _static(row: dict[str, str]) -> dict[str, str]:
    cut = row["chosen"].rindex("Assistant:") + len("Assistant:")
    prompt, chosen, rejected = row["chosen"][:cut], row["chosen"][cut:], row["rejected"][cut:]
    return {"prompt": prompt, "response": chosen, "chosen": chosen, "rejected": rejected}


def small_world(folder: Path, rows: int = 24) -> None:
    """Leaves the first rows of the demo's files and the first prompts of evaluations."""
    prompts = folder / "prompts.csv"
    prompts.write_text("".join(prompts.read_text().splitlines(keepends=True)[:rows]))
    for path in (folder / "demo").glob("*.jsonl.gz"):
        with gzip.open(path, "rb") as file:
            kept = list(islice(file, rows))
        path.write_bytes(gzip.compress(b"".join(kept), mtime=0))


def hub_model(folder: Path, name: str) -> None:
    """A GPT-2 with GPT-2's vocabulary and next to no weights, where the hub's cache would have it."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    commit = "0" * 40
    place = folder / "hub" / f"models--{name.replace('/', '--')}"
    sizes = GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=256, vocab_size=50257, initializer_range=0.1)
    GPT2LMHeadModel(sizes).save_pretrained(place / "snapshots" / commit)
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
