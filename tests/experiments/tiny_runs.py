"""Run folders of random tiny models, as the three stages would leave them."""

import json
from pathlib import Path

import torch
from every_family import TINY
from torch import nn

from config.model_configs import CONFIGS
from models.families import new_model
from models.weights.checkpoint import save_model
from training.start import describe_model
from utils.template import PromptTemplate
from utils.tokenizer import get_tokenizer

SIZES = dict(n_layer=1, block_size=96, vocab_size=1024, init_std=0.3)
SETTINGS = dict(
    dataset="demo", batch_size=4, temperature=1.0, response_length=8, reward_fn="", reward_fn_weight=0.0, seed=0
)


def tiny(role: str = "lm", family: str = "gpt2") -> nn.Module:
    """A model whose answers differ from prompt to prompt."""
    torch.manual_seed(0)
    return new_model(CONFIGS[family](**TINY[family] | SIZES), role).eval()


def save(model: nn.Module, folder: Path, stage: str, step: int) -> Path:
    """A self-contained checkpoint."""
    tokenizer = get_tokenizer("demo")
    save_model(model, folder, {**describe_model(stage, tokenizer, PromptTemplate(), "scratch"), "step": step})
    tokenizer.save(folder)
    return folder


@torch.no_grad()
def make_runs(root: Path, steps: tuple[int, ...] = (2, 4, 6), family: str = "gpt2", **settings) -> Path:
    """An SFT, a reward-model and a PPO run in `root`; returns the last.

    The policy's distance from SFT grows with the step; after the first step it is still the SFT model. The last step is
    saved twice, as final/ too.
    """
    sft, rm = root / "sft_t_20260101000000/final", root / "rm_t_20260101000001/final"
    save(tiny("lm", family), sft, "sft", 5)
    save(tiny("reward", family), rm, "rm", 5)
    run = root / "ppo_t_20260101000002"
    noise = [torch.randn_like(p) for p in tiny("lm", family).parameters()]
    for i, step in enumerate(steps):
        policy = tiny("lm", family)
        for parameter, direction in zip(policy.parameters(), noise):
            parameter += 0.05 * i * direction
        save(policy, run / f"checkpoints/step_{step:08d}", "ppo", step)
    if steps:
        save(policy, run / "final", "ppo", steps[-1])
    run.mkdir(exist_ok=True)
    hyperparams = {"stage": "ppo", "config": SETTINGS | settings, "sft": str(sft), "rm": str(rm)}
    (run / "hyperparams.json").write_text(json.dumps(hyperparams))
    return run
