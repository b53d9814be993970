"""The benchmark's own side: each function does one kind of work with the project's public pieces and random weights.

Started by run.py as a process of its own, `python ours.py WORK`, so that peak memory is that of one work.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from config.configs import PPOConfig, RMConfig, RunConfig, SFTConfig, stage_defaults
from config.devices import choose_dtype
from config.model_configs import get_configs
from experiments.bench.bounds import weight_bytes
from experiments.bench.work import NOT_AN_ID, PRODUCT, Work, median_seconds, peak_gb, run_child
from models.cpu.packing import pack, packed_linear
from models.families import load_checkpoint, new_model
from models.generation import generate
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


def made_up_rows(stage: str, ids: np.ndarray, prompt: int) -> Rows:
    """Rows of a stage from ids [N, L] whose first `prompt` columns are the prompt: N of SFT, N / 2 ranked pairs, or the
    prompts alone for PPO."""
    prompts, responses = ids[:, :prompt], ids[:, prompt:]
    if stage == "ppo":
        return Rows(list(prompts), prompt)
    if stage == "sft":
        return Rows([SFTExample(p, r) for p, r in zip(prompts, responses)], ids.shape[1])
    pairs = zip(*(np.split(part, len(ids) // 2) for part in (prompts, responses)))
    return Rows([RankedExample(tuple(p), tuple(r)) for p, r in pairs], ids.shape[1])


def made_up_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE of any size, so that no vocabulary has to be downloaded: single bytes, then pairs and triples of
    bytes."""
    tokens = (bytes(word) for length in (1, 2, 3) for word in itertools.product(range(256), repeat=length))
    return TiktokenTokenizer("made-up", {token: i for i, token in enumerate(itertools.islice(tokens, vocab_size - 1))})


def endless(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with an EOS that is never sampled: every response takes its full length."""
    tokenizer.eos_id = NOT_AN_ID
    return tokenizer


def steps_of(config: RunConfig, work: Work) -> dict[str, Any]:
    """Settings of a stage for a work: all rows in one optimizer step, in micro-batches no larger than the recipe's."""
    rows = {"batch_size": min(config.batch_size, work.batch), "global_batch_size": work.batch}
    return rows | {"device": work.device, "dtype": "bf16" if work.device == "cpu" else "auto"}  # fp16 on a T4


def half_type(device: str) -> torch.dtype:
    """bf16, or fp16 on a GPU that only emulates it."""
    return torch.float16 if choose_dtype("auto", device) == "fp16" else torch.bfloat16


def synchronise(device: str) -> None:
    """Wait for the GPU, so that a clock read afterwards has seen all work."""
    if device == "cuda":
        torch.cuda.synchronize()


def profiled(work: Work, once: Callable[[], Any]) -> dict[str, Any]:
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
    model = frozen(new_model(get_configs(work.preset)).to(work.device, half_type(work.device)))
    once = prepared_sampling(work, model)
    return {"value": work.batch * work.new / median_seconds(work, once)} | profiled(work, once)


def prepared_sampling(work: Work, model: nn.Module) -> Callable[[], None]:
    """What samples the work's responses, all of them in full length, from a model that is on its device."""
    prompts = random_ids(work.batch, work.prompt, model.config.vocab_size)

    def once() -> None:
        generate(model, prompts, max_new_tokens=work.new, eos_id=NOT_AN_ID, seeds=range(work.batch))
        synchronise(work.device)

    return once


STAGES: dict[str, type[RunConfig]] = {"sft": SFTConfig, "rm": RMConfig, "ppo": PPOConfig}


def stage_config(work: Work) -> RunConfig:
    """The recipe of the work's stage and preset, cut to the work's rows."""
    config = stage_defaults(STAGES[work.kind], work.preset)
    own = {}
    if work.kind == "ppo":
        own = dict(ppo_epochs=work.epochs, minibatches=1, response_length=work.new, prompt_length=work.prompt)
        own |= dict(temperature=1.0, iterations=work.warmup + work.repeats + work.profiled)
    return replace(config, **own, **steps_of(config, work))


def training_step(work: Work) -> dict[str, Any]:
    """Tokens per second of an SFT step, where every token but the first is a target, or of a reward-model step on pairs
    of responses: one optimizer step on every row there is."""
    config, options = stage_config(work), get_configs(work.preset)
    runtime = Runtime(config.device, config.dtype, config.seed)
    model = freeze(new_model(options, "reward" if work.kind == "rm" else "lm"), config, runtime.matrix_dtype)
    # The SFT model only measures the reward's scale, which no step does: a single block stands in for it.
    beside = [new_model(replace(options, n_layer=1, lora_rank=0))] if work.kind == "rm" else []
    with tempfile.TemporaryDirectory() as folder:
        once = prepared_step(work, config, runtime, [model, *beside], Path(folder))
        return {"value": step_tokens(work) / median_seconds(work, once)} | profiled(work, once)


def step_tokens(work: Work) -> int:
    """Tokens behind an optimizer step of SFT, or of a reward model on pairs."""
    return (2 if work.kind == "rm" else 1) * work.batch * (work.prompt + work.new)


def prepared_step(
    work: Work, config: RunConfig, runtime: Runtime, models: Sequence[nn.Module], folder: Path
) -> Callable[[], None]:
    """What takes one optimizer step on made-up rows.

    models: the one that trains; for a reward model the SFT model, too.
    """
    vocab_size = models[0].config.vocab_size
    tokenizer = made_up_tokenizer(vocab_size)
    length = work.prompt + work.new
    data = made_up_rows(work.kind, random_ids(step_tokens(work) // length, length, vocab_size), work.prompt)
    trainer_type = RewardModelTrainer if work.kind == "rm" else SFTTrainer
    trainer = trainer_type(config, *models, tokenizer, data, data, folder, runtime, {})

    def once() -> None:
        figures = trainer.train_step(np.arange(work.batch))
        if not np.isfinite(float(figures["train/loss"])):
            raise FloatingPointError("the loss is not finite")
        synchronise(work.device)

    return once


@torch.no_grad()
def write_checkpoints(work: Work, folder: Path) -> None:
    """An SFT and a reward model for PPO to start from; with a LoRA preset the second is adapters on the first."""
    torch.manual_seed(0)
    options = get_configs(work.preset)
    tokenizer = made_up_tokenizer(options.vocab_size)
    description = {"stage": "sft", "tokenizer": tokenizer.identity(), "template": PromptTemplate().to_dict()}
    save_model(new_model(replace(options, lora_rank=0)), folder / "sft", description)
    model = load_checkpoint(folder / "sft", "reward", options, adapters="fresh")
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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_in_a_process_of_its_own(work, folder)
        config = replace(stage_config(work), actor=str(folder / "sft"), critic=str(folder / "rm"))
        runtime = Runtime(config.device, config.dtype, config.seed)
        roles = ppo_start(config, None, runtime.matrix_dtype)
        placed = (runtime.place(roles.reference), runtime.place(roles.reward_model))
        models = (roles.actor, roles.critic, *placed)
        parts: dict[str, float] = {}
        once = prepared_ppo(work, config, runtime, models, load_tokenizer(roles.sft), folder, parts)
        return {"value": median_seconds(work, once), "parts": dict(parts)} | profiled(work, once)


def prepared_ppo(
    work: Work, config: PPOConfig, runtime: Runtime, models: Sequence[nn.Module], tokenizer: Tokenizer, folder: Path,
    parts: dict[str, float],
) -> Callable[[], None]:  # fmt: skip
    """What does one PPO iteration after another on made-up prompts, and notes the seconds of its phases in `parts`.

    models: actor, critic, reference, reward model; the last two on their device.
    """
    tokenizer = endless(tokenizer)
    ids = random_ids(work.batch * config.iterations, work.prompt, tokenizer.vocab_size)
    prompts = made_up_rows("ppo", ids, work.prompt)
    trainer = PPOTrainer(config, *models, tokenizer, prompts, prompts, folder, runtime, {})
    iterations = itertools.count(1)

    def once() -> None:
        figures = trainer.iteration(next(iterations))
        synchronise(work.device)
        if figures["train/optimizer_steps"] != work.epochs:
            raise RuntimeError(f"{figures['train/optimizer_steps']} optimizer steps, expected {work.epochs}")
        parts.update({f"time/{phase}_s": figures[f"time/{phase}_s"] for phase in trainer.phases.total})

    return once


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
    model = frozen(new_model(get_configs(work.preset)))
    prompts = load_dataset(config.dataset, "ppo", "train", tokenizer, model.config.block_size - config.response_length)
    chosen = [prompts[i] for i in range(work.batch)]
    sampler = Sampler(tokenizer, runtime, config.temperature, config.response_length, config.batch_size)
    once = partial(sampler.sample, model, chosen, range(work.batch))
    tokens = int(once().n.sum())  # the same every time: rows have seeds
    return {"value": tokens / median_seconds(work, once)} | profiled(work, once)


def probe_seconds(once: Callable[[], Any], device: str = "cpu") -> float:
    """Median duration of what measures the hardware."""

    def finished() -> None:
        once()
        synchronise(device)

    return median_seconds(Work("bounds", "bounds", "", warmup=2, repeats=7), finished)


def matrix_flops(device: str = "cpu") -> float:
    """Measured FLOP/s of a product of two square matrices in half precision.

    Of small ones on a processor that only emulates it, where the large ones would take minutes.
    """
    for n in (8192,) if device == "cuda" else (512, 2048):
        a, b = (torch.randn(n, n, device=device, dtype=half_type(device)) for _ in range(2))
        seconds = probe_seconds(partial(torch.matmul, a, b), device)
        if seconds > 0.1:
            break
    return 2 * n**3 / seconds


def read_bandwidth(count: int) -> float:
    """Measured bytes/s of reading `count` bytes, more than the caches hold, once per pass."""
    data = torch.ones(count // 4)
    return 4 * len(data) / probe_seconds(data.sum)


def weights_pass(sizes: dict[str, Any], batch: int, packed: bool = False) -> float:
    """Measured seconds of the matrix products of one decoding step and nothing else, each weight read once.

    The plain read's bound takes arithmetic for free; this one does not. `packed`: in the layout that oneDNN reads
    fastest (`models.cpu.packing`), where there is one; else as `F.linear` does it, which rearranges a weight at every
    call.
    """
    d = sizes["n_embd"]
    shapes = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)] * sizes["n_layer"] + [(sizes["vocab_size"], d)]
    inputs = {n: torch.randn(batch, n, dtype=torch.bfloat16) for n in (d, 4 * d)}
    weights = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    pairs = [(inputs[w.shape[1]], pack(w) if packed else None, w) for w in weights]
    return probe_seconds(
        lambda: [F.linear(x, w) if layout is None else packed_linear(x, layout, None) for x, layout, w in pairs]
    )


@torch.no_grad()
def bounds(work: Work) -> dict[str, Any]:
    """Bandwidth, matrix rate, and the weights' products at batch 8 and 32 in tokens/s."""
    return {
        "bandwidth": read_bandwidth(int(weight_bytes(work))),
        "matrix_flops": matrix_flops(),
        "products_tokens_s": {str(b): b / weights_pass(work.sizes, b) for b in (8, 32)},
        "packed_tokens_s": {str(b): b / weights_pass(work.sizes, b, packed=True) for b in (8, 32)},
    }


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


KINDS = {
    "sampling": sampling, "sft": training_step, "rm": training_step, "ppo": ppo, "rollout": rollout, "bounds": bounds,
}  # fmt: skip

if __name__ == "__main__":
    run_child(measure)
