"""The benchmark's own side: each function does one kind of work with the project's public pieces and random weights.

Started by run.py as a process of its own, `python ours.py WORK`, so that peak memory is that of one work.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from torch import nn

from config.configs import PPOConfig, RMConfig, RunConfig, SFTConfig, get_configs, stage_defaults
from experiments.bench.bounds import half_type, matrix_flops
from experiments.bench.work import NOT_AN_ID, PRODUCT, Work, median_seconds, peak_gb, run_child
from models.generation import generate
from models.gpt import GPT, GPTRewardModel
from models.weights.checkpoint import save_model
from training.engine.runtime import Runtime
from training.sampling import Sampler
from training.start import freeze, frozen, ppo_start
from training.trainers import PPOTrainer, RewardModelTrainer, SFTTrainer
from utils.data.examples import RankedExample, SFTExample
from utils.dataset import load_dataset
from utils.template import PromptTemplate
from utils.tokenizer import TiktokenTokenizer, Tokenizer, get_tokenizer, load_tokenizer


class Rows(list):
    """A data set in memory: examples that can be indexed, and their lengths in tokens."""

    def __init__(self, examples: list, length: int) -> None:
        super().__init__(examples)
        self.lengths = np.full(len(examples), length)


def random_ids(rows: int, length: int, vocab_size: int) -> np.ndarray:
    """[rows, length] int32 ids, the last id of the vocabulary (EOS) not among them."""
    return np.random.default_rng(0).integers(0, vocab_size - 1, (rows, length)).astype(np.int32)


def made_up_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE of any size, so that no vocabulary has to be downloaded: single bytes, then pairs of bytes."""
    tokens = [bytes([a]) for a in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)]
    return TiktokenTokenizer("made-up", {token: i for i, token in enumerate(tokens[: vocab_size - 1])})


def endless(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with an EOS that is never sampled: every response takes its full length."""
    tokenizer.eos_id = NOT_AN_ID
    return tokenizer


def steps_of(config: RunConfig, work: Work) -> dict[str, Any]:
    """Settings of a stage for a work: all rows in one optimizer step, in micro-batches no larger than the recipe's."""
    rows = {"batch_size": min(config.batch_size, work.batch), "global_batch_size": work.batch}
    return rows | {"device": work.device, "dtype": "bf16" if work.device == "cpu" else "auto"}  # fp16 on a T4


def synchronise(device: str) -> None:
    """Wait for the GPU, so that a clock read afterwards has seen all work."""
    if device == "cuda":
        torch.cuda.synchronize()


def profiled(work: Work, once: Callable[[], None]) -> dict[str, Any]:
    """The share of matrix products in the time of one more `once`, for a work that asks for it.

    The profiler counts on this thread alone, which waits for the others inside a product. Its own time falls to what is
    not a product, and its memory comes after the peak that is told.
    """
    if not work.profiled:
        return {}
    peak = peak_gb()
    started = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        once()
        seconds = time.perf_counter() - started
    products = sum(e.self_cpu_time_total for e in profile.key_averages() if PRODUCT.fullmatch(e.key)) / 1e6
    return {"products": products / seconds, "peak_gb": peak}


def sampling(work: Work) -> dict[str, Any]:
    """Tokens per second of `generate`, all weights in half precision."""
    torch.manual_seed(0)
    model = frozen(GPT(get_configs(work.preset)).to(work.device, half_type(work.device)))
    prompts = random_ids(work.batch, work.prompt, model.config.vocab_size)

    def once() -> None:
        generate(model, prompts, max_new_tokens=work.new, eos_id=NOT_AN_ID, seeds=range(work.batch))
        synchronise(work.device)

    return {"value": work.batch * work.new / median_seconds(work, once)} | profiled(work, once)


def sft(work: Work) -> dict[str, Any]:
    """Tokens per second of an SFT step; every token but the first is a target."""
    config = stage_defaults(SFTConfig, work.preset)
    config = replace(config, **steps_of(config, work))
    runtime = Runtime(config.device, config.dtype, config.seed)
    model = freeze(GPT(get_configs(work.preset)), config, runtime.matrix_dtype)
    ids = random_ids(work.batch, work.prompt + work.new, model.config.vocab_size)
    data = Rows([SFTExample(row[: work.prompt], row[work.prompt :]) for row in ids], ids.shape[1])
    tokenizer = made_up_tokenizer(model.config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(config, model, tokenizer, data, data, Path(folder), runtime, {})
        seconds = median_seconds(work, lambda: step(trainer, work))
        return {"value": ids.size / seconds} | profiled(work, lambda: step(trainer, work))


def step(trainer: SFTTrainer | RewardModelTrainer, work: Work) -> None:
    """One optimizer step on every row there is."""
    figures = trainer.train_step(np.arange(work.batch))
    if not np.isfinite(float(figures["train/loss"])):
        raise FloatingPointError("the loss is not finite")
    synchronise(work.device)


def reward_model(work: Work) -> dict[str, Any]:
    """Tokens per second of a reward-model step on pairs of responses."""
    config = stage_defaults(RMConfig, work.preset)
    config = replace(config, **steps_of(config, work))
    runtime = Runtime(config.device, config.dtype, config.seed)
    options = get_configs(work.preset)
    model = freeze(GPTRewardModel(options), config, runtime.matrix_dtype)
    ids = random_ids(2 * work.batch, work.prompt + work.new, options.vocab_size)
    pairs = [RankedExample(tuple(p[:, : work.prompt]), tuple(p[:, work.prompt :])) for p in np.split(ids, work.batch)]
    with tempfile.TemporaryDirectory() as folder:
        # The SFT model only measures the reward's scale, which no step does: a single block stands in for it.
        sft_model = GPT(replace(options, n_layer=1, lora_rank=0))
        trainer = RewardModelTrainer(
            config, model, sft_model, made_up_tokenizer(options.vocab_size), Rows(pairs, ids.shape[1]),
            Rows(pairs, ids.shape[1]), Path(folder), runtime, {"held_out": None},
        )  # fmt: skip
        seconds = median_seconds(work, lambda: step(trainer, work))
        return {"value": ids.size / seconds} | profiled(work, lambda: step(trainer, work))


@torch.no_grad()
def write_checkpoints(work: Work, folder: Path) -> None:
    """An SFT and a reward model for PPO to start from; with a LoRA preset the second is adapters on the first."""
    torch.manual_seed(0)
    options = get_configs(work.preset)
    tokenizer = made_up_tokenizer(options.vocab_size)
    description = {"stage": "sft", "tokenizer": tokenizer.identity(), "template": PromptTemplate().to_dict()}
    save_model(GPT(replace(options, lora_rank=0)), folder / "sft", description)
    model = GPTRewardModel.from_checkpoint(folder / "sft", options, adapters="fresh")
    for name, parameter in model.named_parameters():
        if not options.lora_rank or name.endswith("lora_B"):
            parameter.add_(0.01 * torch.randn_like(parameter))  # trained: its trunk is the SFT model's no more
    save_model(model, folder / "rm", description | {"stage": "rm"})
    for name in ("sft", "rm"):
        tokenizer.save(folder / name)


def ppo(work: Work) -> dict[str, Any]:
    """Seconds of a PPO iteration: rollout, scores, and `epochs` optimizer steps on the whole batch.

    The checkpoints to start from are made by a process of their own (`write`), whose memory does not count.
    """
    config = stage_defaults(PPOConfig, work.preset)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_in_a_process_of_its_own(work, folder)
        config = replace(
            config, actor=str(folder / "sft"), critic=str(folder / "rm"), ppo_epochs=work.epochs, minibatches=1,
            response_length=work.new, prompt_length=work.prompt, temperature=1.0,
            iterations=work.warmup + work.repeats + work.profiled, **steps_of(config, work),
        )  # fmt: skip
        runtime = Runtime(config.device, config.dtype, config.seed)
        roles = ppo_start(config, None, runtime.matrix_dtype)
        tokenizer = endless(load_tokenizer(roles.sft))
        count = work.batch * config.iterations
        prompts = Rows(list(random_ids(count, work.prompt, tokenizer.vocab_size)), work.prompt)
        trainer = PPOTrainer(
            config, roles.actor, roles.critic, runtime.place(roles.reference), runtime.place(roles.reward_model),
            tokenizer, prompts, prompts, folder, runtime, {},
        )  # fmt: skip
        iterations = iter(range(1, config.iterations + 1))
        parts: dict[str, float] = {}

        def once() -> None:
            figures = trainer.iteration(next(iterations))
            synchronise(work.device)
            if figures["train/optimizer_steps"] != work.epochs:
                raise RuntimeError(f"{figures['train/optimizer_steps']} optimizer steps, expected {work.epochs}")
            parts.update({k: float(v) for k, v in figures.items() if k.startswith("time/") and k.endswith("_s")})

        return {"value": median_seconds(work, once), "parts": dict(parts)} | profiled(work, once)


def write_in_a_process_of_its_own(work: Work, folder: Path) -> None:
    """Run `write_checkpoints` where its memory does not count."""
    context = torch.multiprocessing.get_context("spawn")
    process = context.Process(target=write_checkpoints, args=(work, folder))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"writing the models to start from ended with exit code {process.exitcode}")


def rollout(work: Work) -> dict[str, Any]:
    """Tokens per second of sampling for the offline demo: its own prompts, tokenizer and settings."""
    config = stage_defaults(PPOConfig, work.preset)
    runtime = Runtime(work.device, "auto", 0)
    tokenizer = get_tokenizer("demo")
    model: nn.Module = frozen(GPT(get_configs(work.preset)))
    prompts = load_dataset(config.dataset, "ppo", "train", tokenizer, model.config.block_size - config.response_length)
    chosen = [prompts[i] for i in range(work.batch)]
    sampler = Sampler(tokenizer, runtime, config.temperature, config.response_length, config.batch_size)
    tokens = int(sampler.sample(model, chosen, range(work.batch)).n.sum())  # the same every time: rows have seeds

    def once() -> None:
        sampler.sample(model, chosen, range(work.batch))

    return {"value": tokens / median_seconds(work, once)} | profiled(work, once)


def measure(work: Work) -> dict[str, Any]:
    """Do the work; on a GPU under the memory cap, with the GPU's own peak and matrix rate."""
    if work.memory_gb:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, work.memory_gb * 1e9 / total))
    result = KINDS[work.kind](work)
    if work.device == "cuda":
        result["peak_gb"] = torch.cuda.max_memory_reserved() / 1e9
        result["matrix_flops"] = matrix_flops("cuda")
    result["threads"] = torch.get_num_threads()
    return result | {"versions": {p: metadata.version(p) for p in ("torch", "loralib", "accelerate")}}


KINDS = {"sampling": sampling, "sft": sft, "rm": reward_model, "ppo": ppo, "rollout": rollout}

if __name__ == "__main__":
    run_child(measure)
