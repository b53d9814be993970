"""A stage on the device, ready to be repeated: its models made there, its work, what it needs and what was planned.

Models have random weights and never touch the disk; which they are and what they share says the memory plan's list of
roles, so that this page knows no family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from config.configs import PPOConfig, RMConfig, RunConfig, SFTConfig, stage_defaults
from config.devices import TORCH_TYPE
from config.model_configs import ModelConfig, get_configs
from experiments.bench.ours import (
    made_up_tokenizer,
    prepared_ppo,
    prepared_sampling,
    prepared_step,
    stage_config,
    step_tokens,
)
from experiments.bench.work import SECONDS, Work
from experiments.gpu.card import Card
from models.cache import KVCache
from models.families import new_model
from models.lora import is_adapter, share_base
from training.engine.runtime import Runtime
from training.memory.plan import Role, Sources, plan_memory, roles_of
from training.start import freeze, frozen

KINDS = ("sampling", "sft", "rm", "ppo")
_SHAPES = {
    "sampling": dict(batch=64, prompt=128, new=128),
    "sft": dict(batch=32, prompt=1, new=511, warmup=2),
    "rm": dict(batch=16, prompt=256, new=256, warmup=2),
    "ppo": dict(batch=32, prompt=256, new=64, unit=SECONDS),
}
_TINY = {
    "sampling": dict(batch=2, prompt=4, new=5),
    "sft": dict(batch=4, prompt=1, new=15, warmup=1),
    "rm": dict(batch=2, prompt=8, new=8, warmup=1),
    "ppo": dict(batch=4, prompt=8, new=4, epochs=2, unit=SECONDS),
}
# Phases of the memory plan that a work goes through; evaluations and their samples are not among them.
_PHASES = {"sft": ("pass", "step"), "rm": ("pass", "step"), "ppo": ("rollout", "score", "pass", "step")}


def work_of(preset: str, kind: str, card: Card, tiny: bool = False) -> Work:
    """The work of a kind with a preset on the card."""
    shape = (_TINY if tiny else _SHAPES)[kind]
    return Work(f"{preset} {kind}", kind, "", preset=preset, device=card.device, memory_gb=card.memory_gb, **shape)


@dataclass(frozen=True)
class Sizes:
    """What a model's work is counted from: numbers in the matrices of its blocks and in its output projection, blocks
    times channels; bytes that a decoding step reads of weights, and of the cache per row and token."""

    blocks: int
    head: int
    layers_times_channels: int
    lora: bool
    cache_bytes: int

    @classmethod
    def of(cls, model: nn.Module) -> Sizes:
        """Of a language model."""
        matrices = [p for name, p in model.blocks.named_parameters() if p.ndim == 2 and not is_adapter(name)]
        d = model.token_table.shape[1]
        one = KVCache.allocate(model.config, 1, 1, torch.device("meta"), torch.bfloat16)
        return cls(
            blocks=sum(p.numel() for p in matrices),
            head=model.config.vocab_size * d,
            layers_times_channels=len(model.blocks) * d,
            lora=any(is_adapter(name) for name, _ in model.named_parameters()),
            cache_bytes=sum(x.nbytes for x in [*one.keys, *one.values]),
        )

    def step_bytes(self, work: Work) -> float:
        """Least bytes of a decoding step in half precision: every weight once, and half of the responses' cache."""
        return 2 * (self.blocks + self.head) + self.cache_bytes * work.batch * (work.prompt + work.new / 2)

    def flops(self, work: Work) -> float:
        """FLOP of one repetition; the rules are those of `experiments.bench.bounds`, for matrices of any shape."""
        # Multiply-adds of scores and weighted sums per token, a causal half.
        attention = self.layers_times_channels * (work.prompt + work.new)
        trains = 4 if self.lora else 6
        if work.kind == "sampling":
            read = work.prompt * 2 * (self.blocks + attention)
            return work.batch * (read + work.new * 2 * (self.blocks + self.head + attention))
        if work.kind != "ppo":
            head = 0 if work.kind == "rm" else self.head
            return step_tokens(work) * (trains * (self.blocks + head) + 6 * attention)
        tokens, answers = work.batch * (work.prompt + work.new), work.batch * work.new
        trunk, logits = tokens * 2 * (self.blocks + attention), answers * 2 * self.head
        rollout, look = trunk + logits, 4 * trunk + 2 * logits
        return rollout + look + work.epochs * (trains // 2) * (2 * trunk + logits)


@dataclass
class Prepared:
    """A work that can be repeated.

    once: does it, and returns when the device is done. planned: bytes at the peak by the memory plan, without what CUDA
    itself takes; None for sampling alone, which no plan is made for. parts: seconds of the phases of PPO's last
    iteration.
    """

    work: Work
    once: Callable[[], None]
    sizes: Sizes
    model: nn.Module
    planned: float | None = None
    parts: dict[str, float] = field(default_factory=dict)


def planned_peak(work: Work, card: Card) -> float:
    """Bytes at the peak of a stage's work, by the memory plan; nothing is built."""
    config, options = stage_config(work), get_configs(work.preset)
    rows = replace(config, max_length=0 if work.kind == "ppo" else work.prompt + work.new, eval_examples=1)
    plan = plan_memory(rows, sources_of(config, options), card.device, card.dtype, 0.0)
    return max(plan.of_phase(phase) for phase in _PHASES[work.kind])


def sources_of(config: RunConfig, options: ModelConfig) -> Sources:
    """What a stage starts from: models of the preset itself."""
    return Sources(options, options if isinstance(config, PPOConfig) else None)


def build(role: Role, device: str) -> nn.Module:
    """A role's model with random weights, made on the device: on a CPU first it would take a minute for the largest."""
    with torch.device(device):
        return new_model(role.config, role.kind)


def make_models(config: RunConfig, options: ModelConfig, runtime: Runtime) -> list[nn.Module]:
    """The models of a stage in the plan's order, frozen and sharing a base as `training.start` has them."""
    models: list[nn.Module] = []
    for role in roles_of(config, sources_of(config, options)):
        model = build(role, runtime.device.type)
        if models and role.same_base:
            model.load_state_dict(models[0].state_dict(), strict=False)  # all but adapters and head
        looks = role.method == "frozen"
        model = frozen(model, runtime.matrix_dtype) if looks else freeze(model, config, runtime.matrix_dtype)
        models.append(model)
        share_base([models[0], model])
    return models


def language_model(preset: str, card: Card) -> nn.Module:
    """A frozen language model in half precision, for sampling."""
    options = get_configs(preset)
    role = roles_of(stage_defaults(SFTConfig, preset), Sources(options))[0]
    torch.manual_seed(0)
    return frozen(build(role, card.device).to(TORCH_TYPE[card.dtype]))


@contextmanager
def prepared(work: Work, card: Card) -> Iterator[Prepared]:
    """The work with its models on the device; torch.OutOfMemoryError where they do not fit."""
    if work.kind == "sampling":
        model = language_model(work.preset, card)
        yield Prepared(work, prepared_sampling(work, model), Sizes.of(model), model)
        return
    config, options = stage_config(work), get_configs(work.preset)
    runtime = Runtime(config.device, config.dtype, config.seed)
    models = make_models(config, options, runtime)
    parts: dict[str, Any] = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        if isinstance(config, PPOConfig):
            reference, reward, actor, critic = models
            roles, tokenizer = (actor, critic, reference, reward), made_up_tokenizer(options.vocab_size)
            once = prepared_ppo(work, config, runtime, roles, tokenizer, folder, parts)
            model = actor
        else:
            model = models[-1]
            order = [model, *models[:-1]] if isinstance(config, RMConfig) else [model]
            once = prepared_step(work, config, runtime, order, folder)
        yield Prepared(work, once, Sizes.of(model), model, planned_peak(work, card), parts)
