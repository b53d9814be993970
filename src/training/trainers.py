"""The three training loops. Each class is one stage; its `fit` reads from top to bottom.

Shapes: B rows, K completions of a prompt, L columns, T response columns.

What the loops do NOT do: no packing of several examples into a row (rows are padded on the right and bucketed by
length), no trunk shared by actor and critic unless --share-adapter asks for it, no reward or advantage clipping beyond
PPO's own, no entropy bonus.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from config.configs import PPOConfig, RMConfig, SFTConfig
from config.user_error import RunStopped
from training import loop
from training.engine.nonfinite import Guard, NonFiniteRollout, RowView, again_after_overflow
from training.engine.phases import Phases
from training.engine.runtime import Interrupt, Runtime, adamw, set_lr, trainable, update_ratios
from training.experience import ActorCritic, Experience, Rollouts, ScoreTexts, minibatch_plan
from training.held_out import evaluate_policy, evaluate_ranking, sample_answers
from training.invariants import check_first_minibatch, check_frozen, check_reference, check_sampler, parameter_hash
from training.ppo_metrics import add_all, rollout_metrics, update_metrics, value_metrics
from training.reward_scale import RewardScale
from training.sampling import SFT_SAMPLES, Sampler, state_columns
from training.storage.saving import Saver
from utils.data.batching import Batch, RankedBatch, collate_ranked, collate_sft
from utils.dataset import PromptDataset, RankedDataset, SFTDataset
from utils.loss import (
    Moments,
    PolicyStats,
    ValueStats,
    adaptive_kl_coef,
    cosine_with_warmup,
    gae,
    kl_stop_reached,
    linear_to_zero,
    masked_moments,
    masked_sum,
    masked_whiten,
    penalise_missing_eos,
    per_token_rewards,
    policy_loss,
    preference_pairs,
    ranking_loss,
    value_loss,
)  # fmt: skip
from utils.runs.metrics_log import MetricsLog
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
        self.trainable = trainable(model)
        self.total_steps = loop.optimizer_steps(train.lengths, config)
        self.step, self.best = loop.resume_trainer(state, self.optimizer, runtime)
        self.guard = Guard("sft", run, config.on_nonfinite, tokenizer, state)
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
                schedule = (config.min_lr_ratio, config.warmup_steps, self.total_steps)
                set_lr(self.optimizer, cosine_with_warmup(self.step, 1.0, *schedule))
                metrics = self.train_step(rows)
                self.step += 1
                bar.update()
                last = self.step == self.total_steps
                if self.step % config.log_every == 0 or last:
                    bar.set_postfix(loss=f"{self.log.log(self.step, metrics)['train/loss']:.3f}")
                if self.step % config.eval_every == 0 or last:
                    self.evaluate()
                if self.step % config.save_every == 0 or (self.interrupt.signal and not last):
                    self.saver.save_step(self.step, self.state())
                if self.interrupt.signal and not last:
                    return loop.stopped(self.saver, self.step, self.interrupt)
            return loop.finished(self.saver, self.step, self.state())

    @again_after_overflow
    def train_step(self, rows: np.ndarray) -> dict[str, float | Tensor]:
        """One optimizer step on the examples `rows`, in micro-batches; the figures to log."""
        self.model.train()
        started = time.perf_counter()
        cut = loop.micro_batches(rows, self.train.lengths, self.config)
        parts = [[self.train[i] for i in part] for part in cut]
        batches = [collate_sft(part, self.tokenizer.pad_id) for part in parts]
        here = sum(len(sft_targets(b)) for b in batches)
        targets = self.runtime.sum_over_ranks(torch.tensor(here, device=self.runtime.device))
        total = torch.zeros((), device=self.runtime.device)
        for i, batch in enumerate(batches):
            with self.runtime.micro_step(self.model, last=i == len(batches) - 1):
                loss = self.token_loss_sum(batch) / targets
                self.runtime.backward(loss)
            total += loss.detach()
        total = self.runtime.sum_over_ranks(total)
        norms = self.guard.step(
            self.step + 1, self.runtime, self.model, self.optimizer, {"model": self.trainable},
            self.config.max_grad_norm, total, rows, self.view(self.train),
        )  # fmt: skip
        return self.guard.metrics() | {
            "train/loss": total,
            "train/grad_norm": norms["model"] if norms else math.nan,
            "train/lr": self.optimizer.param_groups[0]["lr"],
            "train/epoch": (self.step + 1) / loop.steps_per_epoch(self.train.lengths, self.config),
            "time/tokens_s": sum(int(b.length.sum()) for b in batches) / (time.perf_counter() - started),
        }

    def token_loss_sum(self, batch: Batch) -> Tensor:
        """Sum of the response tokens' losses of a micro-batch, in nats; only their columns meet the vocabulary."""
        ids, att, at = (x.to(self.runtime.device) for x in (batch.ids, batch.att, sft_targets(batch)))
        return self.model(ids, att, right_padded=True, at=at, targets=ids.flatten()[at + 1])

    def view(self, data: SFTDataset) -> RowView:
        """Data row by row, to tell which row of a batch is to blame for a loss that is not finite."""
        return RowView(
            loss=lambda i: self.token_loss_sum(collate_sft([data[i]], self.tokenizer.pad_id)),
            sequences=lambda i: [(data[i].prompt_ids, data[i].response_ids)],
        )

    @torch.no_grad()
    def evaluate(self) -> None:
        """Held-out loss per response token and samples; keeps the best model."""
        self.model.eval()
        total = count = 0.0
        parts = loop.evaluation_batches(self.validation.lengths, self.config)
        for part in tqdm(parts, desc="evaluating", unit="batch", leave=False, delay=3):
            batch = collate_sft([self.validation[i] for i in part], self.tokenizer.pad_id)
            total += float(self.token_loss_sum(batch))
            count += len(sft_targets(batch))
        loss = total / count
        self.guard.evaluation(self.step, loss, np.concatenate(parts), self.view(self.validation))
        metrics = {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 50.0)), **self.sample()}
        self.log.log(self.step, metrics)
        ends = f", {metrics['resp/eos_rate']:.0%} of samples end" if "resp/eos_rate" in metrics else ""
        tqdm.write(f"step {self.step}: held-out loss {loss:.4f} nats/token{ends}")
        if self.step > 0 and loss < self.best and self.saver.save_best(self.step, "eval/loss", loss):
            self.best = loss

    def sample(self) -> dict[str, float]:
        """Sample answers to held-out prompts at temperature 0.7: does the model end what it says?"""
        config, model = self.config, self.runtime.unwrap(self.model)
        room = model.config.block_size - config.sample_tokens
        count = min(SFT_SAMPLES, config.eval_examples, len(self.validation))
        examples = [self.validation[i].prompt_ids for i in range(count)]
        prompts = [p[-room:] for p in examples if len(p)] if room > 0 else []
        if not prompts:
            return {}
        sampler = Sampler.of(config, self.tokenizer, self.runtime, 0.7, config.sample_tokens)
        seeds = loop.row_seeds(config.seed, loop.SFT_SAMPLES, len(prompts))
        figures, shown = sample_answers(model, prompts, seeds, sampler)
        self.log.samples(self.step, shown)
        return figures

    def state(self) -> dict[str, Any]:
        """What a resume needs beside the weights; the data order follows from the step."""
        return loop.trainer_state(self.step, self.best, self.optimizer, self.runtime) | self.guard.state()


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
        self.trainable = trainable(model)
        self.total_steps = loop.optimizer_steps(train.lengths, config)
        self.step, self.best = loop.resume_trainer(state, self.optimizer, runtime)
        self.scale = self.scale_of(sft)
        self.guard = Guard("rm", run, config.on_nonfinite, tokenizer, state)
        self.log = MetricsLog(run, state and state.get("logs"))
        self.saver = Saver(run, {"": model}, tokenizer, description, config.keep, config.on_save_error, self.log)
        if state:
            self.saver.description["held_out"] = state["held_out"]
        self.interrupt = Interrupt()

    def scale_of(self, sft: nn.Module) -> RewardScale:
        """Training prompts and the sampler that PPO will use, to measure the scores of the SFT model's answers on."""
        config = self.config
        room = (config.max_length or sft.config.block_size) - config.response_length
        order = np.random.default_rng(config.seed).permutation(len(self.train))[: config.normalise_prompts]
        prompts = [self.train[i].prompt_ids[0][-room:] for i in order]
        sampler = Sampler.of(config, self.tokenizer, self.runtime, config.temperature, config.response_length)
        return RewardScale(sft, prompts, loop.row_seeds(config.seed, loop.SCALE_SAMPLES, len(prompts)), sampler)

    def fit(self) -> int:
        """Train one epoch, normalise, save; returns the exit code."""
        config = self.config
        bar = tqdm(total=self.total_steps, initial=self.step, desc="RM", unit="step")
        with self.interrupt.watch(), self.log, bar:
            if self.step == 0:
                self.normalise()
                self.evaluate()
            for prompts in loop.data_order(self.train.lengths, config, self.step, self.total_steps):
                schedule = (config.min_lr_ratio, config.warmup_steps, self.total_steps)
                set_lr(self.optimizer, cosine_with_warmup(self.step, 1.0, *schedule))
                metrics = self.train_step(prompts)
                self.step += 1
                bar.update()
                last = self.step == self.total_steps
                if self.step % config.log_every == 0 or last:
                    bar.set_postfix(loss=f"{self.log.log(self.step, metrics)['train/loss']:.3f}")
                if self.step % config.eval_every == 0 or last:
                    self.evaluate()
                if self.step % config.save_every == 0 or (self.interrupt.signal and not last):
                    self.saver.save_step(self.step, self.state())
                if self.interrupt.signal and not last:
                    return loop.stopped(self.saver, self.step, self.interrupt)
            self.normalise()
            return loop.finished(self.saver, self.step, self.state())

    @again_after_overflow
    def train_step(self, prompts: np.ndarray) -> dict[str, float | Tensor]:
        """One optimizer step on all completions of the given prompts; the figures to log."""
        self.model.train()
        started = time.perf_counter()
        count = self.runtime.sum_over_ranks(torch.tensor(len(prompts), device=self.runtime.device))
        total, right, pairs, tokens = (torch.zeros((), device=self.runtime.device) for _ in range(4))
        parts = self.micro_batches(self.train, prompts)
        for i, part in enumerate(parts):
            batch = collate_ranked([self.train[j] for j in part], self.tokenizer.pad_id)
            with self.runtime.micro_step(self.model, last=i == len(parts) - 1):
                scores, mask = self.scores(batch)  # (B, K)
                loss = ranking_loss(scores, mask).sum() / count
                self.runtime.backward(loss)
            total += loss.detach()
            margins = scores.detach()[:, :, None] - scores.detach()[:, None, :]
            ranked = preference_pairs(mask)
            right += masked_sum((margins > 0).float() + 0.5 * (margins == 0).float(), ranked)
            pairs += ranked.sum()
            tokens += batch.rows.length.sum()
        total = self.runtime.sum_over_ranks(total)
        norms = self.guard.step(
            self.step + 1, self.runtime, self.model, self.optimizer, {"model": self.trainable},
            self.config.max_grad_norm, total, prompts, self.view(self.train),
        )  # fmt: skip
        return self.guard.metrics() | {
            "train/loss": total,
            "train/accuracy": self.runtime.sum_over_ranks(right) / self.runtime.sum_over_ranks(pairs).clamp(min=1),
            "train/grad_norm": norms["model"] if norms else math.nan,
            "train/lr": self.optimizer.param_groups[0]["lr"],
            "train/epoch": (self.step + 1) / loop.steps_per_epoch(self.train.lengths, self.config),
            "time/tokens_s": float(tokens) / (time.perf_counter() - started),
        }

    def micro_batches(self, data: RankedDataset, rows: np.ndarray) -> list[np.ndarray]:
        """Cut rows, sorted by length, into passes; in a budget of tokens every completion of a row counts."""
        completions = [len(data[i].response_ids) for i in rows]
        return loop.micro_batches(rows, data.lengths, self.config, completions)

    def scores(self, batch: RankedBatch) -> tuple[Tensor, Tensor]:
        """Scores [B, K] and their mask, from one forward of every completion."""
        rows, mask = batch.rows.to(self.runtime.device), batch.mask.to(self.runtime.device)
        flat = self.model(rows.ids, rows.att, right_padded=True)  # (all completions,)
        return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat), mask

    def view(self, data: RankedDataset) -> RowView:
        """Data row by row, to tell which row of a batch is to blame for a loss that is not finite."""
        return RowView(
            loss=lambda i: ranking_loss(*self.scores(collate_ranked([data[i]], self.tokenizer.pad_id))).sum(),
            sequences=lambda i: list(zip(data[i].prompt_ids, data[i].response_ids)),
        )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out accuracy, calibration and the length baseline; keeps the best model.

        Loss and calibration are those of the scores that were trained, before the affine is measured anew.
        """
        self.model.eval()
        parts = self.micro_batches(self.validation, loop.evaluation_rows(self.validation.lengths, self.config))
        examples = [[self.validation[i] for i in part] for part in parts]
        batches = [collate_ranked(part, self.tokenizer.pad_id) for part in examples]
        report = evaluate_ranking(batches, self.scores)
        self.guard.evaluation(self.step, report["nll"], np.concatenate(parts), self.view(self.validation))
        self.log.log(self.step, {f"eval/{key}": value for key, value in report.items()})
        tqdm.write(
            f"step {self.step}: held-out accuracy {report['accuracy']:.3f} (chance 0.500, longer wins "
            f"{report['longer_wins']:.3f}), loss {report['nll']:.4f} (chance {math.log(2):.4f}), calibration error "
            f"{report['ece']:.3f}"
        )
        figures = {key: value if math.isfinite(value) else None for key, value in report.items()}
        self.saver.description["held_out"] = {"prompts": sum(map(len, parts)), "step": self.step, **figures}
        if self.step > 0 and report["nll"] < self.best:
            with self.normalised():
                saved = self.saver.save_best(self.step, "eval/nll", report["nll"])
            self.best = report["nll"] if saved else self.best
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
        """Set the model's affine and note in the checkpoint how it was measured."""
        config, model = self.config, self.runtime.unwrap(self.model)
        try:
            raw = self.scale.measure(model)
        except ValueError as error:
            raise RunStopped(f"step {self.step}: {error} ({self.guard.last_good()}); lower --lr") from error
        sampled = {"samples": len(raw), "temperature": config.temperature, "response_length": config.response_length}
        self.saver.description["normalised"] = {"step": self.step, **sampled}
        gain, bias = model.normalisation
        return {"raw_mean": float(raw.mean()), "raw_sd": float(raw.std(correction=0)), "gain": gain, "bias": bias}

    @contextlib.contextmanager
    def normalised(self) -> Iterator[None]:
        """The model with its affine measured now; training then goes on with the one it had."""
        model, description = self.runtime.unwrap(self.model), self.saver.description
        before = model.normalisation, description.get("normalised")
        self.measure_scale()
        yield
        model.set_normalisation(*before[0])
        description["normalised"] = before[1]

    def state(self) -> dict[str, Any]:
        """What a resume needs beside the weights; the data order follows from the step."""
        held_out = {"held_out": self.saver.description["held_out"]}
        state = loop.trainer_state(self.step, self.best, self.optimizer, self.runtime) | self.guard.state()
        return state | held_out


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
        of_actor = trainable(actor)
        seen = {id(p) for p in of_actor}  # with --share-adapter the critic's own part is its head
        self.parameters = {"actor": of_actor, "critic": [p for p in trainable(critic) if id(p) not in seen]}
        groups = [
            {"name": "actor", "params": self.parameters["actor"], "lr": config.lr},
            {"name": "critic", "params": self.parameters["critic"], "lr": config.critic_lr},
        ]
        optimizer = adamw(groups, (0.9, 0.999), config.adam_eps, config.weight_decay, runtime.device)
        self.policy, self.optimizer = runtime.prepare(ActorCritic(actor, critic), optimizer, config.compile)
        self.frozen = {"reference": reference} | ({"reward model": reward_model} if reward_model is not None else {})
        self.rollouts = Rollouts(self.policy, reference, reward_model, reward_fn, config, tokenizer, runtime)
        self.total_steps = min(config.iterations, config.max_steps or config.iterations)
        self.step, self.best = loop.resume_trainer(state, self.optimizer, runtime)
        self.kl_coef = state["kl_coef"] if state else config.kl_coef
        self.phases = Phases(runtime.wait)
        self.guard = Guard("ppo", run, config.on_nonfinite, tokenizer, state)
        self.log = MetricsLog(run, state and state.get("logs"))
        models = {"": actor, "critic": critic}
        self.saver = Saver(run, models, tokenizer, description, config.keep, config.on_save_error, self.log)
        self.interrupt = Interrupt()

    def fit(self) -> int:
        """Run all iterations, or up to a signal; returns the exit code."""
        config = self.config
        before = {name: parameter_hash(model) for name, model in self.frozen.items()}
        bar = tqdm(total=self.total_steps, initial=self.step, desc="PPO", unit="it")
        with self.interrupt.watch(), self.log, bar:
            if self.step == 0:
                self.evaluate()
            while self.step < self.total_steps:
                update = self.step + 1
                warm = min(1.0, update / config.warmup_iterations) if config.warmup_iterations else 1.0
                frozen = "actor" if update <= config.critic_warmup else None
                set_lr(self.optimizer, warm * linear_to_zero(update, self.total_steps), frozen)
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
                if self.step % config.save_every == 0 or (self.interrupt.signal and not last):
                    self.saver.save_step(self.step, self.state())
                if self.interrupt.signal and not last:
                    return loop.stopped(self.saver, self.step, self.interrupt)
            check_frozen(before, {name: parameter_hash(model) for name, model in self.frozen.items()})
            tqdm.write(self.phases.summary())
            return loop.finished(self.saver, self.step, self.state())

    def iteration(self, update: int) -> dict[str, float | Tensor]:
        """One rollout and the updates on it; the figures to log."""
        config, phases = self.config, self.phases
        with phases("rollout"):
            rows = loop.prompt_order(len(self.train), config.global_batch_size, config.seed, update)
            seeds = loop.row_seeds(config.seed, update, len(rows))
            experience = self.rollouts.sample([self.train[i] for i in rows], seeds)
        tokens = int(experience.n.sum())

        plans = self.plans(experience, update)
        self.policy.train()  # no role has dropout, so this changes no figure; the first-minibatch check would tell
        try:
            self.rollouts.look(experience, [part for minibatch in plans[0] for part in minibatch], phases)
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
            stats = self.moments_over_ranks(rewards, experience.rmask)
            rewards = masked_whiten(rewards, experience.rmask, shift_mean=False, stats=stats)
        advantages, returns = gae(rewards, experience.values, experience.rmask, config.gamma, config.lam)
        stats = self.moments_over_ranks(advantages, experience.rmask)
        whitened = masked_whiten(advantages, experience.rmask, stats=stats)
        metrics = rollout_metrics(experience, penalised, self.kl_coef)
        self.guard.check_kl(update, experience, rows, metrics["objective/kl"], config.max_kl)
        metrics |= value_metrics(experience.values, returns, advantages, experience.rmask)
        with phases("update"):
            metrics |= self.update(experience, whitened, returns, plans) | self.guard.metrics()
        if config.kl_target:
            episodes = len(rows) * self.runtime.world_size
            kl = float(self.runtime.sum_over_ranks(metrics["objective/kl"])) / self.runtime.world_size
            self.kl_coef = adaptive_kl_coef(self.kl_coef, kl, config.kl_target, episodes, config.kl_horizon)
        return metrics | phases.end_round(tokens)

    def update(
        self, experience: Experience, advantages: Tensor, returns: Tensor, plans: list[list[list[np.ndarray]]]
    ) -> dict[str, float | Tensor]:
        """ppo_epochs x minibatches optimizer steps; micro-batches only accumulate."""
        config = self.config
        epochs, norms, stop, dropped = [], [], False, False  # epochs: one (PolicyStats, ValueStats) per pass
        for plan in plans:
            stats_of_pass = []
            for minibatch in plan:
                stats = self.optimizer_step(experience, advantages, returns, minibatch, norms)
                if stats is None:  # not finite: the rest of this rollout is dropped with it
                    dropped = True
                    break
                stats_of_pass.append(stats)
                # The statistics are from before the step that they belong to; the step itself has been taken.
                stop = bool(config.kl_stop) and kl_stop_reached(float(stats[0].means()["approx_kl"]), config.kl_stop)
                if stop:
                    break
            epochs += [add_all(stats_of_pass)] if stats_of_pass else []
            if stop or dropped:
                break
        if not epochs:
            return {"train/optimizer_steps": 0}
        policy, value = add_all(epochs)
        metrics = update_metrics(policy.means(), value.means())
        metrics |= {f"policy/approxkl_epoch{e + 1}": stats[0].means()["approx_kl"] for e, stats in enumerate(epochs)}
        metrics |= {f"grad_norm/{name}": torch.stack([n[name] for n in norms]).mean() for name in self.parameters}
        metrics |= {f"update_ratio/{name}": ratio for name, ratio in update_ratios(self.optimizer).items()}
        metrics |= {f"{group['name']}_lr": group["lr"] for group in self.optimizer.param_groups}
        return metrics | {"train/optimizer_steps": len(norms), "policy/kl_stopped": float(stop)}

    @again_after_overflow
    def optimizer_step(
        self, experience: Experience, advantages: Tensor, returns: Tensor, minibatch: list[np.ndarray],
        norms: list[dict[str, Tensor]],
    ) -> tuple[PolicyStats, ValueStats] | None:  # fmt: skip
        """One step on a minibatch: each micro-batch adds its share of the minibatch's token mean.

        Appends the gradient norms to `norms`; the first step of an iteration finds it empty and checks the invariants.
        None: the loss or a gradient was not finite, and the step was skipped.
        """
        config = self.config
        tokens = sum(int(experience.n[part].sum()) for part in minibatch)
        denom = self.runtime.sum_over_ranks(torch.tensor(tokens, device=self.runtime.device))
        value_clip = config.value_clip_eps or math.inf

        def losses(part: np.ndarray) -> tuple[Tensor, tuple[PolicyStats, ValueStats]]:
            batch = experience.micro_batch(part)
            at = (batch.rows, slice(batch.rmask.shape[1]))
            logp, values, _ = self.policy(batch, config.temperature)
            pi = policy_loss(logp, experience.logp[at], advantages[at], batch.rmask, config.clip_eps, denom)
            v = value_loss(values, experience.values[at], returns[at], batch.rmask, value_clip, denom)
            return pi.loss + config.vf_coef * v.loss, (pi.stats, v.stats)

        stats, total = [], torch.zeros((), device=self.runtime.device)
        for i, part in enumerate(minibatch):
            with self.runtime.micro_step(self.policy, last=i == len(minibatch) - 1):
                loss, of_part = losses(part)
                self.runtime.backward(loss)
            total += loss.detach()
            stats.append(of_part)
        policy, value = (
            type(x)(self.runtime.sum_over_ranks(x.sums), self.runtime.max_over_ranks(x.maxima)) for x in add_all(stats)
        )
        total = self.runtime.sum_over_ranks(total)
        if not norms and bool(total.isfinite()):  # what is not finite is told below, with its rows
            check_first_minibatch(policy.means(), value.means(), self.runtime.dtype)
        rows = loop.prompt_order(len(self.train), config.global_batch_size, config.seed, self.step + 1)
        view = RowView(
            loss=lambda i: losses(np.array([i]))[0],
            sequences=lambda i: [(experience.prompts()[i], experience.responses()[i])],
            index=lambda i: int(rows[i]),
        )
        taken = self.guard.step(
            self.step + 1, self.runtime, self.policy, self.optimizer, self.parameters, config.max_grad_norm,
            total, np.concatenate(minibatch), view,
        )  # fmt: skip
        if taken is None:
            return None
        norms.append(taken)
        return policy, value

    def plans(self, experience: Experience, update: int) -> list[list[list[np.ndarray]]]:
        """The minibatches of every pass, each a list of micro-batches.

        Drawn before the old log-probabilities are taken, so that these see the very micro-batches of the first pass.
        """
        config = self.config
        generator = np.random.default_rng([config.seed, 1, update])
        sizes = (config.minibatches, config.batch_size, generator, config.tokens_per_micro_batch)
        return [minibatch_plan(experience.lengths, *sizes) for _ in range(config.ppo_epochs)]

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
        told = ", ".join(f"{key.removeprefix('eval/')} {value:.3f}" for key, value in figures.items())
        tqdm.write(f"iteration {self.step}: held-out {told}")
        reward = figures["eval/rlhf_reward"]
        if self.step > 0 and -reward < self.best and self.saver.save_best(self.step, "eval/rlhf_reward", reward):
            self.best = -reward

    def moments_over_ranks(self, x: Tensor, mask: Tensor) -> Moments:
        """Count, sum and sum of squares of the whole rollout batch of all ranks."""
        return Moments(*self.runtime.sum_over_ranks(torch.stack(masked_moments(x, mask))))

    def state(self) -> dict[str, Any]:
        """What a resume needs beside the weights; prompts and sampling seeds follow from the iteration."""
        state = loop.trainer_state(self.step, self.best, self.optimizer, self.runtime) | self.guard.state()
        return state | {"kl_coef": self.kl_coef}
