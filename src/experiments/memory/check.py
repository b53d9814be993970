"""One short run of a stage in a process of its own, and its peak memory beside the plan's: `-t memory --check`.

Started by run.py as `python check.py CASE`. The run is a stage's whole life in small: models loaded from
checkpoints on disk, an evaluation with samples, two optimizer steps of two micro-batches each, another evaluation, the
checkpoints saved. Only the data are made up.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from config.configs import PPOConfig, RMConfig, RunConfig, SFTConfig, stage_defaults
from config.model_configs import get_configs
from experiments.bench.ours import endless, made_up_rows, made_up_tokenizer, random_ids, write_in_a_process_of_its_own
from experiments.bench.work import Work, answer, peak_gb
from training.engine.runtime import Runtime
from training.memory.device import base_bytes
from training.memory.plan import plan_memory
from training.memory.sources import plan_sources
from training.start import freeze, ppo_start, rm_start, sft_start
from training.trainers import PPOTrainer, RewardModelTrainer, SFTTrainer
from utils.tokenizer import load_tokenizer

STAGES: dict[str, type[RunConfig]] = {"sft": SFTConfig, "rm": RMConfig, "ppo": PPOConfig}


@dataclass(frozen=True)
class Case:
    """One line of the check: `rows` sequences of `length` tokens in a micro-batch."""

    stage: str
    preset: str
    dtype: str
    rows: int
    length: int
    activation_checkpointing: bool = False
    device: str = "cpu"

    @property
    def response(self) -> int:
        """Tokens of a sampled response."""
        return min(64, self.length // 2)

    def title(self) -> str:
        """For the table."""
        recompute = ", checkpointing" if self.activation_checkpointing else ""
        return f"{self.stage} {self.preset} {self.dtype}, {self.rows} x {self.length}{recompute}"


def stage_config(case: Case, folder: Path) -> RunConfig:
    """The stage's own recipe, cut to two optimizer steps of two micro-batches."""
    config = stage_defaults(STAGES[case.stage], case.preset)
    rows = case.rows // 2 if case.stage == "rm" else case.rows  # a ranked row has two completions here
    common = dict(
        batch_size=rows, global_batch_size=2 * rows, tokens_per_micro_batch=0, max_length=case.length, max_steps=2,
        eval_examples=rows, activation_checkpointing=case.activation_checkpointing, dtype=case.dtype,
        device=case.device,
    )  # fmt: skip
    own = {
        "sft": dict(pretrain=str(folder / "sft"), sample_tokens=8),
        "rm": dict(pretrain=str(folder / "sft"), normalise_prompts=8, response_length=case.response),
        "ppo": dict(
            actor=str(folder / "sft"), critic=str(folder / "rm"), response_length=case.response, ppo_epochs=2,
            max_steps=1,
        ),
    }  # fmt: skip
    return replace(config, **(common | own[case.stage]))


def run_stage(case: Case, config: RunConfig, folder: Path) -> int:
    """Train as the stage's script does, on made-up rows that are all of full length."""
    runtime = Runtime(config.device, config.dtype, config.seed)
    tokenizer = made_up_tokenizer(get_configs(case.preset).vocab_size)
    ids = random_ids(4 * case.rows, case.length, tokenizer.vocab_size)
    run = folder / "run"
    run.mkdir()
    data = made_up_rows(case.stage, ids, case.length - case.response)
    if case.stage == "sft":
        model, *_ = sft_start(config, None)
        freeze(model, config, runtime.matrix_dtype)
        return SFTTrainer(config, model, tokenizer, data, data, run, runtime, {}).fit()
    if case.stage == "rm":
        model, sft, *_ = rm_start(config, None, runtime.matrix_dtype)
        sft = runtime.place(sft)
        return RewardModelTrainer(config, model, sft, tokenizer, data, data, run, runtime, {}).fit()
    roles = ppo_start(config, None, runtime.matrix_dtype)
    return PPOTrainer(
        config, roles.actor, roles.critic, runtime.place(roles.reference), runtime.place(roles.reward_model),
        endless(load_tokenizer(roles.sft)), data, data, run, runtime, {},
    ).fit()  # fmt: skip


def check(case: Case) -> dict[str, Any]:
    """Plan, run, compare: predicted and measured peak in GB."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_in_a_process_of_its_own(Work("check", "ppo", "", preset=case.preset), folder)
        config = stage_config(case, folder)
        plan = plan_memory(config, plan_sources(config), case.device, config.dtype, base_bytes(case.device))
        run_stage(case, config, folder)
        measured = peak_gb() if case.device == "cpu" else gpu_peak_gb()
        return {"predicted_gb": plan.peak / 1e9, "measured_gb": measured, "phase": plan.peak_phase, **asdict(case)}


def gpu_peak_gb() -> float:
    """Most memory that was taken of a GPU that nobody else uses, with what CUDA itself takes, in GB (1e9 bytes)."""
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    return (context + torch.cuda.max_memory_reserved()) / 1e9


if __name__ == "__main__":
    answer(check(Case(**json.loads(sys.argv[1]))))
