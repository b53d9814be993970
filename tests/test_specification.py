"""Rules of the three stages that span modules: several processes, the defaults, cut responses on their way to a score.

Everything that one module alone can break is tested beside that module.
"""

import json
import math
import multiprocessing
import os
import re
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from config.configs import PPOConfig, RMConfig, SFTConfig, stage_defaults
from config.model_configs import PRESETS, GPTConfig
from models.gpt import GPT, GPTActor, GPTCritic, GPTRewardModel
from training import loop
from training.engine.runtime import Runtime
from training.experience import split_minibatches
from training.start import frozen
from training.trainers import PPOTrainer, RewardModelTrainer, SFTTrainer
from utils.data.examples import RankedExample, SFTExample
from utils.loss import penalise_missing_eos
from utils.tokenizer import get_tokenizer

ROWS = 8
SHARED = ("loss", "policy", "grad_norm")  # groups of PPO's figures that are summed over processes
SMALL = dict(batch_size=2, global_batch_size=ROWS, adam_eps=1e-5)


class Examples(list):
    """A data set in memory; `lengths` are the tokens of its rows."""

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) if isinstance(row, np.ndarray) else self.tokens(row) for row in self])

    @staticmethod
    def tokens(row: SFTExample | RankedExample) -> int:
        if isinstance(row, SFTExample):
            return len(row.prompt_ids) + len(row.response_ids)
        return len(row.prompt_ids[0]) + max(map(len, row.response_ids))


def model_of(cls: type[GPT], vocab_size: int, seed: int) -> GPT:
    torch.manual_seed(seed)
    sizes = dict(n_layer=2, n_head=2, n_embd=16, block_size=64, init_std=0.1)
    return cls(GPTConfig(name="gpt2-nano", vocab_size=vocab_size, **sizes))


def ids(rng: np.random.Generator, low: int, high: int, end: list[int] | None = None) -> np.ndarray:
    return np.array([*rng.integers(0, 1000, rng.integers(low, high)), *(end or [])], dtype=np.int32)


def trainers_of(folder: Path, runtime: Runtime, **ppo) -> tuple[SFTTrainer, RewardModelTrainer, PPOTrainer]:
    """The three stages on tiny models, the same in every process; rows of very different lengths."""
    tok, rng = get_tokenizer("demo"), np.random.default_rng(0)
    end = [tok.eos_id]
    sft, ranked, prompts = Examples(), Examples(), Examples()
    for i in range(ROWS):
        prompt = ids(rng, 2, 14)
        sft.append(SFTExample(prompt, ids(rng, 1, 20 if i % 2 else 3, end)))
        ranked.append(RankedExample((prompt,) * (2 + i % 3), tuple(ids(rng, 1, 9, end) for _ in range(2 + i % 3))))
        prompts.append(prompt)

    def made(cls: type[GPT], seed: int) -> GPT:
        return model_of(cls, tok.vocab_size, seed)

    runs = [folder / name for name in ("sft", "rm", "ppo")]
    for run in runs:
        run.mkdir(parents=True)
    rm_config = RMConfig(**SMALL, lr=1e-2, response_length=8, normalise_prompts=8)
    settings = dict(lr=1e-3, critic_lr=1e-3, ppo_epochs=2, response_length=8, temperature=0.8)
    ppo_config = PPOConfig(**{**SMALL, **settings, **ppo})
    given = (runtime, {})
    return (
        SFTTrainer(SFTConfig(**SMALL, lr=1e-2), made(GPT, 0), tok, sft, sft, runs[0], *given),
        RewardModelTrainer(
            rm_config, made(GPTRewardModel, 1), frozen(made(GPT, 0)), tok, ranked, ranked, runs[1], *given,
        ),
        PPOTrainer(
            ppo_config, made(GPTActor, 0), made(GPTCritic, 1), frozen(made(GPT, 0)), frozen(made(GPTRewardModel, 1)),
            tok, prompts, prompts, runs[2], *given,
        ),
    )  # fmt: skip


def first_updates(folder: Path, rank: int, world: int) -> dict[str, dict[str, torch.Tensor]]:
    """Weights after one step of each stage, of this process's share of one and the same global batch."""
    order, seeds = loop.prompt_order, loop.row_seeds
    loop.prompt_order = lambda *args: order(*args)[rank::world]
    loop.row_seeds = lambda seed, purpose, rows: seeds(seed, purpose, rows * world)[rank::world]
    try:
        runtime = Runtime("cpu", "fp32", 3)
        drawn = torch.rand(4)
        assert (runtime.rank, runtime.world_size) == (rank, world)
        sft, rm, ppo = trainers_of(folder, runtime)
        figures = {}
        for name, trainer in (("sft", sft), ("rm", rm)):
            metrics = trainer.train_step(np.argsort(trainer.train.lengths, kind="stable")[rank::world])
            figures |= {f"{name} {key}": metrics[f"train/{key}"] for key in ("loss", "grad_norm")}
        metrics = ppo.iteration(1)
        figures |= {f"ppo {key}": value for key, value in metrics.items() if key.split("/")[0] in SHARED}
        models = {"sft": sft.model, "rm": rm.model, "ppo": ppo.policy}
        found = {name: dict(runtime.unwrap(model).state_dict()) for name, model in models.items()}
    finally:
        loop.prompt_order, loop.row_seeds = order, seeds
    return found | {"drawn": {"": drawn}, "figures": {key: torch.as_tensor(figures[key]) for key in figures}}


def one_of_two(rank: int, port: int, folder: Path) -> None:
    """Body of a process of a group of two."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    torch.set_num_threads(1)
    torch.save(first_updates(folder / str(rank), rank, 2), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path) -> None:
    """Sums and counts go over all processes: no mean of means, no loss that grows with their number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    group = [spawn.Process(target=one_of_two, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in group:
        process.start()
    alone = first_updates(tmp_path / "alone", 0, 1)
    for process in group:
        process.join(120)
    if any(process.is_alive() for process in group):
        for process in group:
            process.kill()
    assert [process.exitcode for process in group] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    tok = get_tokenizer("demo")
    start = {"sft": (GPT, 0), "rm": (GPTRewardModel, 1)}
    for stage, (cls, seed) in start.items():
        before = model_of(cls, tok.vocab_size, seed).state_dict()
        assert max(float((alone[stage][key] - before[key]).abs().max()) for key in before) > 1e-3, stage
    for stage in ("sft", "rm", "ppo"):
        for key, value in alone[stage].items():
            torch.testing.assert_close(first[stage][key], value, atol=1e-5, rtol=0, msg=f"{stage} {key}")
            assert torch.equal(first[stage][key], second[stage][key]), f"{stage} {key}"
    # AdamW hides the scale of a gradient; its norm does not. The entropy is that of each process's own rows.
    for key, value in alone["figures"].items():
        if "entropy" not in key:
            torch.testing.assert_close(first["figures"][key], value, atol=1e-6, rtol=1e-4, msg=key, check_dtype=False)
    # Every process draws numbers of its own: rank 0 those of a run alone, the next ones a fixed distance away.
    assert torch.equal(first["drawn"][""], alone["drawn"][""])
    torch.manual_seed(3 + 100003)
    assert torch.equal(second["drawn"][""], torch.rand(4))


@pytest.mark.parametrize("preset", PRESETS)
def test_defaults_of_the_update(preset: str) -> None:
    """What papers agree on; a silent change would make runs incomparable with them and with each other."""
    sft, rm, ppo = (stage_defaults(stage, preset) for stage in (SFTConfig, RMConfig, PPOConfig))
    assert (ppo.gamma, ppo.lam, ppo.clip_eps, ppo.value_clip_eps, ppo.vf_coef) == (1.0, 0.95, 0.2, 0.2, 0.1)
    assert ppo.missing_eos_penalty > 0 and not ppo.whiten_rewards and ppo.kl_target == 0 < ppo.kl_coef
    assert ppo.ppo_epochs * ppo.minibatches > 1, "with one update per rollout no clip ever acts"
    assert rm.adam_eps == ppo.adam_eps == 1e-5
    assert {config.max_grad_norm for config in (sft, rm, ppo)} == {1.0}
    assert rm.weight_decay == ppo.weight_decay == 0.0
    assert rm.min_lr_ratio == 0.0 and sft.min_lr_ratio == 0.1


@pytest.mark.parametrize("family", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
@pytest.mark.parametrize("variant", ["", "/lora"])
def test_defaults_for_gpt2(family: str, variant: str) -> None:
    rm, ppo = stage_defaults(RMConfig, family + variant), stage_defaults(PPOConfig, family + variant)
    assert rm.epochs == 1, "a second epoch overfits and inflates the reward"
    assert (ppo.temperature, ppo.kl_coef, ppo.ppo_epochs, ppo.minibatches) == (0.7, 0.05, 4, 1)
    assert ppo.global_batch_size >= 128 and rm.normalise_prompts >= 256


def test_a_cut_response_is_scored_at_its_last_token_and_then_fined(tmp_path) -> None:
    """No EOS is put behind it, neither for the score nor in what is trained on."""
    trainer = trainers_of(tmp_path, Runtime("cpu", "fp32", 0))[2]
    rollouts, eos = trainer.rollouts, trainer.rollouts.tokenizer.eos_id
    with torch.no_grad():  # make EOS likely, so that both kinds of row come
        rollouts.actor.transformer.wte.weight[eos] = 1.7 * rollouts.actor.transformer.wte.weight[5]
    prompts = [prompt for prompt in trainer.train for _ in range(40)]
    experience = rollouts.sample(prompts, list(range(len(prompts))))
    rollouts.evaluate_roles(experience, split_minibatches(experience.lengths, 1, 64, np.random.default_rng(0))[0])
    cut = [b for b, ended in enumerate(experience.ended.tolist()) if not ended]
    assert 0 < len(cut) < len(experience)
    model = rollouts.reward_model
    for b in cut[:10]:
        row = torch.tensor([[*experience.prompts()[b], *experience.responses()[b]]])
        assert len(experience.responses()[b]) == 8 and eos not in experience.responses()[b]
        with torch.no_grad():
            expected = model.head(model.hidden(row))[0, -1]
        torch.testing.assert_close(experience.scores[b], expected, atol=1e-5, rtol=0)
    fined = penalise_missing_eos(experience.scores, experience.ended, 1.0)
    torch.testing.assert_close(fined[cut], experience.scores[cut] - 1.0)
    ended = experience.ended
    assert torch.equal(fined[ended], experience.scores[ended])


def test_the_value_coefficient_weighs_the_gradient_of_the_critic_alone(tmp_path) -> None:
    """Steps of AdamW hardly show it, so that nothing else would tell whether it is used."""
    norms = []
    for vf_coef in (0.1, 1.0):
        trainer = trainers_of(tmp_path / str(vf_coef), Runtime("cpu", "fp32", 0), vf_coef=vf_coef, ppo_epochs=1)[2]
        metrics = trainer.iteration(1)
        norms.append([float(metrics[f"grad_norm/{name}"]) for name in ("actor", "critic")] + [metrics["loss/value"]])
    (actor, critic, loss), (other_actor, other_critic, other_loss) = norms
    assert other_critic == pytest.approx(10 * critic, rel=1e-4) and other_actor == actor
    assert other_loss == loss  # the figure is that of the loss itself


def test_the_reward_models_learning_rate_rises_and_falls_to_zero(tmp_path) -> None:
    trainer = trainers_of(tmp_path, Runtime("cpu", "fp32", 0))[1]
    trainer.config = replace(trainer.config, warmup_steps=2, log_every=1, eval_every=100)
    trainer.total_steps = 8
    trainer.fit()
    lines = [json.loads(line) for line in (trainer.run / "metrics.jsonl").read_text().splitlines()]
    rates = [line["train/lr"] for line in lines if "train/lr" in line]
    cosine = [0.5 * (1 + math.cos(math.pi * s / 6)) for s in range(6)]
    assert rates == pytest.approx([1e-2 * share for share in (0.5, 1.0, *cosine)])


def test_the_coverage_table_names_tests_that_exist() -> None:
    tests = Path(__file__).parent
    named = re.findall(r"`([\w/]+\.py)::(\w+)(\*?)`", (tests.parent / "docs" / "coverage.md").read_text())
    assert len(named) > 100
    for file, name, star in named:
        found = re.search(rf"^def {name}{'' if star else '[(]'}", (tests / file).read_text(), re.MULTILINE)
        assert found, f"{file}::{name}{star}"
