"""The three training loops. Each class is one stage; its `fit` reads from top to bottom.

Shapes: B rows, K completions of a prompt, L columns, T response columns.

What the loops do NOT do: no packing of several examples into a row (rows are padded on the right and bucketed by
length), no trunk shared by actor and critic unless --share-adapter asks for it, no reward or advantage clipping beyond
PPO's own, no entropy bonus.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from config.configs import PPOConfig, RMConfig, SFTConfig
from config.user_error import RunStopped
from training import loop
from training.engine.nonfinite import Guard, NonFiniteRollout, again_after_overflow
from training.engine.phases import Phases
from training.engine.runtime import Interrupt, Runtime, adamw, set_lr, trainable
from training.engine.suspects import SuspectRow
from training.experience import ActorCritic, Experience, Rollouts, ScoreTexts, split_minibatches, whiten_over_ranks
from training.held_out import answer_prompts, evaluate_policy, evaluate_ranking, ranking_in_words
from training.invariants import check_first_minibatch, check_frozen, check_reference, check_sampler, digests
from training.ppo_metrics import add_all, rollout_metrics, update_metrics, value_metrics
from training.reward_scale import RewardScale, kept_affine
from training.sampling import state_columns
from training.storage.saving import Saver
from utils.data.batching import Batch, RankedBatch, collate_ranked, collate_sft
from utils.dataset import PromptDataset, RankedDataset, SFTDataset
from utils.loss import (
    PolicyStats,
    ValueStats,
    adaptive_kl_coef,
    gae,
    kl_stop_reached,
    penalise_missing_eos,
    per_token_rewards,
    policy_loss,
    ranking_loss,
    value_loss,
)  # fmt: skip
from utils.metrics import right_and_all_pairs
from utils.runs.metrics_log import MetricsLog
from utils.template import PromptTemplate
from utils.tokenizer import Tokenizer


class SFTTrainer:
    """Supervised fine-tuning: cross-entropy on response tokens and EOS, token-weighted over the whole step."""

    def __init__(
        self, config: SFTConfig, model: nn.Module, tokenizer: Tokenizer, train: SFTDataset, validation: SFTDataset,
        run: Path, runtime: Runtime, description: dict[str, Any], state: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.tokenizer, self.runtime, self.run = config, tokenizer, runtime, run
        self.train, self.validation = train, validation
        groups = [{"name": "model", "params": list(model.parameters()), "lr": config.lr}]
        optimizer = adamw(groups, (0.9, config.beta2), config.adam_eps, config.weight_decay, runtime.device)
        self.model, self.optimizer = runtime.prepare(model, optimizer, config.compile)
        self.parameters = {"model": trainable(model)}
        self.total_steps = loop.optimizer_steps(train.lengths, config)
        self.step, self.best = loop.resume_trainer(state, self.optimizer, runtime)
        self.guard = Guard("sft", run, config.on_nonfinite, tokenizer, runtime, state)
        self.log = MetricsLog(run, state and state.get("logs"))
        self.saver = Saver(run, {"": model}, tokenizer, description, config.keep, config.on_save_error, self.log)
        self.interrupt = Interrupt()

    def fit(self) -> int:
        """Train to the end, or to a signal; returns the exit code."""
        config = self.config
        bar = tqdm(total=self.total_steps, initial=self.step, desc="SFT", unit="step")
        with self.interrupt.watch(), self.log, bar:
            if self.step == 0:
                self.evaluate()
            for rows in loop.data_order(self.train.lengths, config, self.step, self.total_steps):
                floor, warmup = config.min_lr_ratio, config.warmup_steps
                set_lr(self.optimizer, loop.cosine_with_warmup(self.step, 1.0, floor, warmup, self.total_steps))
                metrics = self.train_step(rows)
                self.step += 1
                bar.update()
                last = self.step == self.total_steps
                if self.step % config.log_every == 0 or last:
                    bar.set_postfix(loss=f"{self.log.log(self.step, metrics)['train/loss']:.3f}")
                if self.step % config.eval_every == 0 or last:
                    self.evaluate()
                if loop.save_or_stop(self, last):
                    return self.interrupt.exit_code
            return loop.finished(self)

    @again_after_overflow
    def train_step(self, rows: np.ndarray) -> dict[str, float | Tensor]:
        """One optimizer step on the examples `rows`, in micro-batches; the figures to log."""
        self.model.train()
        started = time.perf_counter()
        batches = [self.collate(self.train, m) for m in loop.micro_batches(rows, self.train.lengths, self.config)]
        own_targets = sum(len(sft_targets(b)) for b in batches)
        targets = self.runtime.sum_over_ranks(torch.tensor(own_targets, device=self.runtime.device))
        total, norms = torch.zeros((), device=self.runtime.device), {}  # norms stay empty where the batch is skipped
        for batch in self.runtime.accumulate(self.model, batches):
            loss = self.token_loss_sum(batch) / targets
            self.runtime.backward(loss)
            total += loss.detach()
        total = self.runtime.sum_over_ranks(total)
        with self.guard.step(self.step + 1, self.model, self.optimizer, rows, partial(self.alone, self.train)):
            norms = self.runtime.step(self.optimizer, self.parameters, self.config.max_grad_norm, total)
        return self.guard.metrics() | {
            "train/loss": total,
            **loop.step_metrics(self, norms),
            "time/tokens_per_s": sum(int(b.length.sum()) for b in batches) / (time.perf_counter() - started),
        }

    def collate(self, data: SFTDataset, rows: Iterable[int]) -> Batch:
        """The given rows as one batch."""
        return collate_sft([data[i] for i in rows], self.tokenizer.pad_id)

    def token_loss_sum(self, batch: Batch) -> Tensor:
        """Sum of the response tokens' losses of a micro-batch, in nats; only their columns meet the vocabulary."""
        ids, att, at = (x.to(self.runtime.device) for x in (batch.ids, batch.att, sft_targets(batch)))
        return self.model(ids, att, right_padded=True, at=at, targets=ids.flatten()[at + 1])

    def alone(self, data: SFTDataset, row: int) -> SuspectRow:
        """A row with its own loss, to tell which one of a batch is to blame where that is not finite."""
        loss = self.token_loss_sum(self.collate(data, [row]))
        return SuspectRow(row, [(data[row].prompt_ids, data[row].response_ids)], {"loss": loss})

    @torch.no_grad()
    def evaluate(self) -> None:
        """Held-out loss per response token and samples; keeps the best model."""
        self.model.eval()
        micro_batches = loop.evaluation_batches(self.validation.lengths, self.config)
        batches = [self.collate(self.validation, micro_batch) for micro_batch in micro_batches]
        shown = tqdm(batches, desc="evaluating", unit="batch", leave=False, delay=3)
        loss = sum(float(self.token_loss_sum(b)) for b in shown) / sum(len(sft_targets(b)) for b in batches)
        self.guard.evaluation(self.step, loss, np.concatenate(micro_batches), partial(self.alone, self.validation))
        metrics = {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 50.0)), **self.sample()}
        self.log.log(self.step, metrics)
        ends = f", {metrics['resp/eos_rate']:.0%} of samples end" if "resp/eos_rate" in metrics else ""
        tqdm.write(f"step {self.step}: held-out loss {loss:.4f} nats/token{ends}")
        if self.step > 0 and loss < self.best and self.saver.save_best(self.step, "eval/loss", loss):
            self.best = loss

    def sample(self) -> dict[str, float]:
        """Sample answers to held-out prompts: does the model end what it says?"""
        model = self.runtime.unwrap(self.model)
        figures, shown = answer_prompts(
            model, self.validation, self.config, self.tokenizer, self.runtime, PromptTemplate.of(self.saver.description)
        )
        if shown:
            self.log.samples(self.step, shown)
        return figures

    def state(self) -> dict[str, Any]:
        """What a resume needs beside the weights; the data order follows from the step."""
        return loop.trainer_state(self)


def sft_targets(batch: Batch) -> Tensor:
    """Flattened columns [N] whose logits predict a response token or the EOS; of a text without a prompt, all but the
    first token."""
    first = batch.prompt_len.clamp(min=1)  # nothing predicts a row's first token
    return state_columns(first, batch.length - first, batch.ids.shape[1])


class RewardModelTrainer:
    """Reward model: pairwise ranking loss over K completions, each forwarded once; then the scale PPO relies on."""

    def __init__(
        self, config: RMConfig, model: nn.Module, sft: nn.Module, tokenizer: Tokenizer, train: RankedDataset,
        validation: RankedDataset, run: Path, runtime: Runtime, description: dict[str, Any],
        state: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.tokenizer, self.runtime, self.run = config, tokenizer, runtime, run
        self.train, self.validation = train, validation
        groups = [{"name": "model", "params": list(model.parameters()), "lr": config.lr}]
        optimizer = adamw(groups, (0.9, 0.999), config.adam_eps, config.weight_decay, runtime.device)
        self.model, self.optimizer = runtime.prepare(model, optimizer, config.compile)
        self.parameters = {"model": trainable(model)}
        self.total_steps = loop.optimizer_steps(train.lengths, config)
        self.step, self.best = loop.resume_trainer(state, self.optimizer, runtime)
        self.scale = RewardScale.of(config, sft, train, tokenizer, runtime)
        self.guard = Guard("rm", run, config.on_nonfinite, tokenizer, runtime, state)
        self.log = MetricsLog(run, state and state.get("logs"))
        self.saver = Saver(run, {"": model}, tokenizer, description, config.keep, config.on_save_error, self.log)
        if state:
            self.saver.description["held_out"] = state["held_out"]
        self.interrupt = Interrupt()

    def fit(self) -> int:
        """Train all epochs, normalise, save; returns the exit code."""
        config = self.config
        bar = tqdm(total=self.total_steps, initial=self.step, desc="RM", unit="step")
        with self.interrupt.watch(), self.log, bar:
            if self.step == 0:
                self.normalise()
                self.evaluate()
            for prompts in loop.data_order(self.train.lengths, config, self.step, self.total_steps):
                floor, warmup = config.min_lr_ratio, config.warmup_steps
                set_lr(self.optimizer, loop.cosine_with_warmup(self.step, 1.0, floor, warmup, self.total_steps))
                metrics = self.train_step(prompts)
                self.step += 1
                bar.update()
                last = self.step == self.total_steps
                if self.step % config.log_every == 0 or last:
                    bar.set_postfix(loss=f"{self.log.log(self.step, metrics)['train/loss']:.3f}")
                if self.step % config.eval_every == 0 or last:
                    self.evaluate()
                if loop.save_or_stop(self, last):
                    return self.interrupt.exit_code
            self.normalise()
            return loop.finished(self)

    @again_after_overflow
    def train_step(self, prompts: np.ndarray) -> dict[str, float | Tensor]:
        """One optimizer step on all completions of the given prompts; the figures to log."""
        self.model.train()
        started = time.perf_counter()
        count = self.runtime.sum_over_ranks(torch.tensor(len(prompts), device=self.runtime.device))
        total, counts = torch.zeros((), device=self.runtime.device), torch.zeros(2, device=self.runtime.device)
        tokens, norms = 0, {}  # norms stay empty where the batch is skipped
        for micro_batch in self.runtime.accumulate(self.model, self.micro_batches(self.train, prompts)):
            batch = self.collate(self.train, micro_batch)
            scores, mask = self.scores(batch)  # (B, K)
            loss = ranking_loss(scores, mask).sum() / count
            self.runtime.backward(loss)
            total += loss.detach()
            counts += right_and_all_pairs(scores, mask)
            tokens += int(batch.rows.length.sum())
        total, (right, pairs) = self.runtime.sum_over_ranks(total), self.runtime.sum_over_ranks(counts)
        with self.guard.step(self.step + 1, self.model, self.optimizer, prompts, partial(self.alone, self.train)):
            norms = self.runtime.step(self.optimizer, self.parameters, self.config.max_grad_norm, total)
        return self.guard.metrics() | {
            "train/loss": total,
            "train/accuracy": right / pairs.clamp(min=1),
            **loop.step_metrics(self, norms),
            "time/tokens_per_s": tokens / (time.perf_counter() - started),
        }

    def micro_batches(self, data: RankedDataset, rows: np.ndarray) -> list[np.ndarray]:
        """Cut rows, sorted by length, into passes; in a budget of tokens every completion of a row counts."""
        completions = [len(data[i].response_ids) for i in rows]
        return loop.micro_batches(rows, data.lengths, self.config, completions)

    def collate(self, data: RankedDataset, rows: Iterable[int]) -> RankedBatch:
        """All completions of the given rows as one batch."""
        return collate_ranked([data[i] for i in rows], self.tokenizer.pad_id)

    def scores(self, batch: RankedBatch) -> tuple[Tensor, Tensor]:
        """Scores [B, K] and their mask, from one forward of every completion."""
        rows, mask = batch.rows.to(self.runtime.device), batch.mask.to(self.runtime.device)
        flat = self.model(rows.ids, rows.att, right_padded=True)  # (all completions,)
        return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat), mask

    def alone(self, data: RankedDataset, row: int) -> SuspectRow:
        """A row with its own loss, to tell which one of a batch is to blame where that is not finite."""
        loss = ranking_loss(*self.scores(self.collate(data, [row]))).sum()
        return SuspectRow(row, list(zip(data[row].prompt_ids, data[row].response_ids)), {"loss": loss})

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out accuracy, calibration and the length baseline; keeps the best model.

        Loss and calibration are those of the scores that were trained, before the affine is measured anew.
        """
        self.model.eval()
        rows = loop.evaluation_rows(self.validation.lengths, self.config)
        batches = [self.collate(self.validation, m) for m in self.micro_batches(self.validation, rows)]
        report = evaluate_ranking(batches, self.scores)
        self.guard.evaluation(self.step, report["nll"], rows, partial(self.alone, self.validation))
        self.log.log(self.step, {f"eval/{key}": value for key, value in report.items()})
        tqdm.write(f"step {self.step}: held-out {ranking_in_words(report)}")
        figures = {key: value if math.isfinite(value) else None for key, value in report.items()}
        self.saver.description["held_out"] = {"prompts": len(rows), "step": self.step, **figures}
        if self.step > 0 and report["nll"] < self.best:
            with kept_affine(self.runtime.unwrap(self.model), self.saver.description):  # training goes on with it
                self.measure_scale()
                if self.saver.save_best(self.step, "eval/nll", report["nll"]):
                    self.best = report["nll"]
        return report

    def normalise(self) -> None:
        """Give the scores of SFT samples mean 0 and deviation 1, and log what they were."""
        figures = self.measure_scale()
        self.log.log(self.step, {f"norm/{key}": value for key, value in figures.items()})
        tqdm.write(
            f"step {self.step}: raw scores of {len(self.scale.prompts)} SFT samples have mean "
            f"{figures['raw_mean']:.3f}, deviation {figures['raw_sd']:.3f}; normalised to 0 and 1"
        )

    def measure_scale(self) -> dict[str, float]:
        """Set the model's affine and note in the checkpoint how it was measured; see `RewardScale.normalise`."""
        try:
            return self.scale.normalise(self.runtime.unwrap(self.model), self.step, self.saver.description)
        except ValueError as error:
            raise RunStopped(f"step {self.step}: {error} ({self.guard.last_good()})") from error

    def state(self) -> dict[str, Any]:
        """What a resume needs beside the weights; the data order follows from the step."""
        return loop.trainer_state(self) | {"held_out": self.saver.description["held_out"]}


class PPOTrainer:
    """PPO (Schulman et al. 2017; Ziegler et al. 2019): sample, score, estimate advantages, clipped updates."""

    def __init__(
        self, config: PPOConfig, actor: nn.Module, critic: nn.Module, reference: nn.Module,
        reward_model: nn.Module | None, tokenizer: Tokenizer, train: PromptDataset, validation: PromptDataset,
        run: Path, runtime: Runtime, description: dict[str, Any], reward_fn: ScoreTexts | None = None,
        eval_reward_fn: ScoreTexts | None = None, state: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.runtime, self.run = config, runtime, run
        self.train, self.validation, self.eval_reward_fn = train, validation, eval_reward_fn
        shared = {id(p) for p in trainable(actor)}  # with --share-adapter the critic's own parameters are its head's
        own = [p for p in trainable(critic) if id(p) not in shared]
        self.parameters = {"actor": trainable(actor), "critic": own}
        rates = {"actor": config.lr, "critic": config.critic_lr}
        groups = [{"name": name, "params": self.parameters[name], "lr": rate} for name, rate in rates.items()]
        optimizer = adamw(groups, (0.9, 0.999), config.adam_eps, config.weight_decay, runtime.device)
        self.policy, self.optimizer = runtime.prepare(ActorCritic(actor, critic), optimizer, config.compile)
        self.frozen = {"reference": reference} | ({"reward model": reward_model} if reward_model is not None else {})
        roles = (self.policy, reference, reward_model, reward_fn)
        self.rollouts = Rollouts(*roles, config, tokenizer, runtime, PromptTemplate.of(description))
        self.total_steps = min(config.iterations, config.max_steps or config.iterations)
        self.step, self.best = loop.resume_trainer(state, self.optimizer, runtime)
        self.kl_coef = state["kl_coef"] if state else config.kl_coef
        self.phases = Phases(runtime.wait)
        self.guard = Guard("ppo", run, config.on_nonfinite, tokenizer, runtime, state)
        self.log = MetricsLog(run, state and state.get("logs"))
        models = {"": actor, "critic": critic}
        self.saver = Saver(run, models, tokenizer, description, config.keep, config.on_save_error, self.log)
        self.interrupt = Interrupt()

    def fit(self) -> int:
        """Run all iterations, or up to a signal; returns the exit code."""
        config = self.config
        before = digests(self.frozen)
        bar = tqdm(total=self.total_steps, initial=self.step, desc="PPO", unit="it")
        with self.interrupt.watch(), self.log, bar:
            if self.step == 0:
                self.evaluate()
            for update in range(self.step + 1, self.total_steps + 1):
                warm = min(1.0, update / config.warmup_iterations) if config.warmup_iterations else 1.0
                frozen = "actor" if update <= config.critic_warmup else None
                set_lr(self.optimizer, warm * loop.linear_to_zero(update, self.total_steps), frozen)
                metrics = self.iteration(update)
                self.step = update
                bar.update()
                values = self.log.log(self.step, metrics)
                if "resp/len_mean" in values:
                    shown = {k: f"{values[f'objective/{k}']:.2f}" for k in ("score", "kl")}
                    bar.set_postfix(shown | {"len": f"{values['resp/len_mean']:.0f}"})
                last = self.step == self.total_steps
                if self.step % config.eval_every == 0 or last:
                    self.evaluate()
                if loop.save_or_stop(self, last):
                    return self.interrupt.exit_code
            check_frozen(before, digests(self.frozen))
            tqdm.write(self.phases.summary())
            return loop.finished(self)

    def iteration(self, update: int) -> dict[str, float | Tensor]:
        """One rollout and the updates on it; the figures to log."""
        config, phases = self.config, self.phases
        with phases("rollout"):
            rows = loop.prompt_order(len(self.train), config.global_batch_size, config.seed, update)
            seeds = loop.row_seeds(config.seed, update, len(rows))
            experience = self.rollouts.sample([self.train[i] for i in rows], seeds)
        tokens = int(experience.n.sum())

        # Drawn before the old log-probabilities are taken, so that these see the very micro-batches of the first pass.
        generator = np.random.default_rng([config.seed, 1, update])
        sizes = (config.minibatches, config.batch_size, generator, config.tokens_per_micro_batch)
        epochs = [split_minibatches(experience.lengths, *sizes) for _ in range(config.ppo_epochs)]
        self.policy.train()  # no role has dropout, so this changes no figure; the first-minibatch check would tell
        try:
            self.rollouts.evaluate_roles(experience, list(itertools.chain(*epochs[0])), phases)
        except NonFiniteRollout as error:
            self.guard.rollout(update, error, rows)
            return self.guard.metrics() | phases.end_round(tokens)
        if update == 1:
            check_reference(experience, self.runtime.dtype)
        check_sampler(experience, self.runtime.dtype)
        penalised = penalise_missing_eos(experience.scores, experience.ended, config.missing_eos_penalty)
        n = experience.n.to(penalised.device)
        rewards = per_token_rewards(penalised, experience.logp, experience.logp_ref, n, self.kl_coef)
        if config.whiten_rewards:
            rewards = whiten_over_ranks(rewards, experience.rmask, self.runtime, shift_mean=False)
        advantages, returns = gae(rewards, experience.values, experience.rmask, config.gamma, config.lam)
        whitened = whiten_over_ranks(advantages, experience.rmask, self.runtime)
        metrics = rollout_metrics(experience, penalised, self.kl_coef)
        self.guard.check_kl(update, experience, rows, metrics["objective/kl"], config.max_kl)
        metrics |= value_metrics(experience.values, returns, advantages, experience.rmask)
        with phases("update"):
            metrics |= self.update(experience, whitened, returns, epochs) | self.guard.metrics()
        if config.kl_target:
            episodes = len(rows) * self.runtime.world_size
            kl = float(self.runtime.sum_over_ranks(metrics["objective/kl"])) / self.runtime.world_size
            self.kl_coef = adaptive_kl_coef(self.kl_coef, kl, config.kl_target, episodes, config.kl_horizon)
        return metrics | phases.end_round(tokens)

    def update(
        self, experience: Experience, advantages: Tensor, returns: Tensor, epochs: list[list[list[np.ndarray]]]
    ) -> dict[str, float | Tensor]:
        """ppo_epochs x minibatches optimizer steps; the figures to log.

        epochs: of each pass its minibatches, and of each minibatch the rows of its micro-batches.
        """
        stats_of: list[list[tuple[PolicyStats, ValueStats]]] = [[] for _ in epochs]
        norms, kl_stop, stopped = [], self.config.kl_stop, False
        for epoch, minibatch in ((e, minibatch) for e, minibatches in enumerate(epochs) for minibatch in minibatches):
            stats = self.optimizer_step(experience, advantages, returns, minibatch, norms)
            if stats is None:  # not finite: the rest of this rollout is dropped with it
                break
            stats_of[epoch].append(stats)
            # The statistics are from before the step that they belong to; the step itself has been taken.
            stopped = bool(kl_stop) and kl_stop_reached(float(stats[0].means()["approx_kl"]), kl_stop)
            if stopped:
                break
        if not norms:
            return {"train/optimizer_steps": 0}
        taken = {"train/optimizer_steps": len(norms), "policy/kl_stopped": float(stopped)}
        return update_metrics([stats for stats in stats_of if stats], norms, self.optimizer) | taken

    @again_after_overflow
    def optimizer_step(
        self, experience: Experience, advantages: Tensor, returns: Tensor, minibatch: list[np.ndarray],
        norms: list[dict[str, Tensor]],
    ) -> tuple[PolicyStats, ValueStats] | None:  # fmt: skip
        """One step on a minibatch: each micro-batch adds its share of the minibatch's token mean.

        Appends the gradient norms to `norms`; the first step of an iteration finds it empty and checks the invariants.
        None: the loss or a gradient was not finite, and the step was skipped.
        """
        config, runtime = self.config, self.runtime
        tokens = sum(int(experience.n[rows].sum()) for rows in minibatch)
        denom = runtime.sum_over_ranks(torch.tensor(tokens, device=runtime.device))
        value_clip = config.value_clip_eps or math.inf

        def forward(rows: np.ndarray) -> tuple[Tensor, tuple[PolicyStats, ValueStats]]:
            batch = experience.micro_batch(rows)
            old = (batch.rows, slice(batch.rmask.shape[1]))  # where the micro-batch's [b, T] stands in the rollout
            logp, values, _ = self.policy(batch, config.temperature)  # `ActorCritic`: log pi and V, each [b, T]
            pi = policy_loss(logp, experience.logp[old], advantages[old], batch.rmask, config.clip_eps, denom)
            v = value_loss(values, experience.values[old], returns[old], batch.rmask, value_clip, denom)
            return pi.loss + config.vf_coef * v.loss, (pi.stats, v.stats)

        def alone(i: int) -> SuspectRow:
            row = loop.prompt_order(len(self.train), config.global_batch_size, config.seed, self.step + 1)[i]
            return SuspectRow(int(row), [experience.sequence(i)], {"loss": forward(np.array([i]))[0]})

        total, stats = torch.zeros((), device=runtime.device), []
        for rows in runtime.accumulate(self.policy, minibatch):
            loss, stats_of_rows = forward(rows)
            runtime.backward(loss)  # gradients add up
            total += loss.detach()
            stats.append(stats_of_rows)
        policy, value = (
            type(x)(runtime.sum_over_ranks(x.sums), runtime.max_over_ranks(x.maxima)) for x in add_all(stats)
        )
        total = runtime.sum_over_ranks(total)
        if not norms and bool(total.isfinite()):  # what is not finite is the guard's
            check_first_minibatch(policy.means(), value.means(), runtime.dtype)
        # Unscale, clip, step, zero; where a number is not finite the guard stops the run, or the batch is skipped.
        with self.guard.step(self.step + 1, self.policy, self.optimizer, np.concatenate(minibatch), alone):
            norms.append(runtime.step(self.optimizer, self.parameters, config.max_grad_norm, total))
            return policy, value
        return None

    def evaluate(self) -> None:
        """Score, KL and length on fixed held-out prompts with fixed sampling seeds; keeps the best model."""
        count = min(self.config.eval_examples, len(self.validation))
        prompts = [self.validation[i] for i in range(count)]
        seeds = loop.row_seeds(self.config.seed, loop.EVALUATION_SAMPLES, count)
        try:
            figures, shown = evaluate_policy(self.rollouts, prompts, seeds, self.eval_reward_fn)
        except NonFiniteRollout as error:
            self.guard.rollout(self.step, error, range(count), drop=False)
            return
        self.log.log(self.step, figures)
        self.log.samples(self.step, shown)
        in_words = ", ".join(f"{key.removeprefix('eval/')} {value:.3f}" for key, value in figures.items())
        tqdm.write(f"iteration {self.step}: held-out {in_words}")
        reward = figures["eval/rlhf_reward"]
        if self.step > 0 and -reward < self.best and self.saver.save_best(self.step, "eval/rlhf_reward", reward):
            self.best = -reward

    def state(self) -> dict[str, Any]:
        """What a resume needs beside the weights; prompts and sampling seeds follow from the iteration."""
        return loop.trainer_state(self) | {"kl_coef": self.kl_coef}
