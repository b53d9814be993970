"""A tokenizer of letters, tiny data sets in memory, and what tests look at in trainers."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from config.devices import choose_dtype
from training.engine.runtime import Runtime
from training.trainers import PPOTrainer
from utils.data.examples import RankedExample, SFTExample
from utils.tokenizer import Tokenizer

VOCAB, EOS = 50, 49


def runtime_on(device: str, dtype: str = "fp32") -> Runtime:
    """A runtime in a precision of its own: Accelerate keeps the first one's for the whole process."""
    if (device, dtype) == ("cuda", "bf16") and choose_dtype("auto", device) != "bf16":
        pytest.skip("this GPU only emulates bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    return Runtime(device, dtype, 0)


class LetterTokenizer(Tokenizer):
    """One id per character, from "0" on; 49 is EOS."""

    kind, name, vocab_size, eos_id = "letters", "letters", VOCAB, EOS

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(c) - 48 for c in text] for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return "".join(chr(48 + i) for i in ids)

    @cached_property
    def _sha256(self) -> str:
        return "0" * 64

    def _save_files(self, folder: Path) -> None:
        (folder / "letters.txt").write_text("letters")

    def for_transformers(self) -> None:
        raise NotImplementedError


class Examples(list):
    """A data set in memory: examples that can be indexed, and their lengths in tokens."""

    def __init__(self, examples: Sequence, lengths: Sequence[int]) -> None:
        super().__init__(examples)
        self.lengths = np.array(lengths)


def random_ids(rng: np.random.Generator, low: int, high: int) -> np.ndarray:
    """Between `low` and `high` ids that are not EOS."""
    return rng.integers(0, EOS, size=rng.integers(low, high + 1)).astype(np.int32)


def response(rng: np.random.Generator, low: int, high: int) -> np.ndarray:
    """Like `random_ids`, with an EOS behind."""
    return np.append(random_ids(rng, low, high), EOS).astype(np.int32)


def sft_examples(count: int, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    rows = [SFTExample(random_ids(rng, 2, 12), response(rng, 1, 10)) for _ in range(count)]
    return Examples(rows, [len(r.prompt_ids) + len(r.response_ids) for r in rows])


def ranked_examples(count: int, seed: int = 0, completions: Sequence[int] = (2,)) -> Examples:
    """Rankings whose number of completions goes round in `completions`."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        k, prompt = completions[i % len(completions)], random_ids(rng, 2, 12)
        rows.append(RankedExample((prompt,) * k, tuple(response(rng, 1, 10) for _ in range(k))))
    return Examples(rows, [len(r.prompt_ids[0]) + max(map(len, r.response_ids)) for r in rows])


def prompt_examples(count: int, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    rows = [random_ids(rng, 2, 12) for _ in range(count)]
    return Examples(rows, list(map(len, rows)))


def read_metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a model's tensors."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 0.0) -> None:
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def new_run(folder: Path) -> Path:
    run = folder / f"run{len(list(folder.iterdir()))}"
    run.mkdir()
    return run


def ppo_models(trainer: PPOTrainer) -> SimpleNamespace:
    """The four roles inside a trainer."""
    policy, rollouts = trainer.runtime.unwrap(trainer.policy), trainer.rollouts
    return SimpleNamespace(
        actor=policy.actor, critic=policy.critic, reference=rollouts.reference, reward_model=rollouts.reward_model
    )
