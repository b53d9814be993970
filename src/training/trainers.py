"""The three training loops. Each class is one stage; its `fit` reads from top to bottom.

Shapes: B rows, K completions of a prompt, L columns, T response columns.

What the loops do NOT do: no packing of several examples into a row (rows are padded on the right and bucketed by length), no shared
trunk of actor and critic, no reward or advantage clipping beyond PPO's own, no entropy bonus.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from config.configs import PPOConfig, RMConfig, RunConfig, SFTConfig
from inference.generate import generate
from training.experience import ActorCritic, Experience, Rollouts, ScoreTexts, compact, minibatch_plan, state_columns
from training.invariants import check_first_minibatch, check_frozen, check_reference, parameter_hash
from training.loop import (
    data_order, evaluation_batches, finished, micro_batches, optimizer_steps, prompt_order, resume_trainer, row_seeds, stopped,
    trainer_state,
)  # fmt: skip
from training.ppo_metrics import rollout_metrics, update_metrics, value_metrics
from training.runtime import Interrupt, Runtime, adamw, set_lr
from training.saving import Saver
from utils.batching import Batch, RankedBatch, collate_ranked, collate_sft
from utils.dataset import PromptDataset, RankedDataset, SFTDataset
from utils.loss import (
    Moments, PolicyStats, ValueStats, adaptive_kl_coef, cosine_with_warmup, cross_entropy_sum, gae, kl_k1, kl_stop_reached, linear_to_zero, masked_moments,
    masked_sum, masked_whiten, penalise_missing_eos, per_token_rewards, policy_loss, preference_pairs, ranking_loss, reward_affine, value_loss,
)  # fmt: skip
from utils.metrics import ranking_report, text_degeneracy
from utils.metrics_log import MetricsLog
from utils.tokenizer import Tokenizer


class SFTTrainer:
    """Supervised fine-tuning: cross-entropy on response tokens and EOS, token-weighted over the whole optimizer step."""

    def __init__(
        self, config: SFTConfig, model: nn.Module, tokenizer: Tokenizer, train: SFTDataset, validation: SFTDataset,
        run: Path, runtime: Runtime, description: dict[str, Any], state: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.tokenizer, self.runtime, self.run = config, tokenizer, runtime, run
        self.train, self.validation = train, validation
        groups = [{"name": "model", "params": list(model.parameters()), "lr": config.lr}]
        optimizer = adamw(groups, (0.9, config.beta2), 1e-8, config.weight_decay, runtime.device)
        self.model, self.optimizer = runtime.prepare(model, optimizer)
        self.trainable = trainable(model)
        self.total_steps = optimizer_steps(train.lengths, config)
        self.step, self.best = resume_trainer(state, self.optimizer)
        self.log = MetricsLog(run, self.step)
        self.saver = Saver(run, {"": model}, tokenizer, description, config.keep)
        self.interrupt = Interrupt()

    def fit(self) -> int:
        """Train to the end, or to a signal; returns the exit code."""
        config = self.config
        with self.interrupt.watch(), tqdm(total=self.total_steps, initial=self.step, desc="SFT", unit="step") as bar:
            if self.step == 0:
                self.evaluate()
            for rows in data_order(self.train.lengths, config, self.step, self.total_steps):
                set_lr(
                    self.optimizer,
                    cosine_with_warmup(self.step, 1.0, config.min_lr_ratio, config.warmup_steps, self.total_steps),
                )
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
                    return stopped(self.run, self.step, self.interrupt)
        return finished(self.saver, self.step, self.state(), self.log)

    def train_step(self, rows: np.ndarray) -> dict[str, float | Tensor]:
        """One optimizer step on the examples `rows`, in micro-batches; the figures to log."""
        self.model.train()
        started = time.perf_counter()
        batches = [
            collate_sft([self.train[i] for i in part], self.tokenizer.pad_id)
            for part in micro_batches(rows, self.config)
        ]
        targets = self.runtime.sum_over_ranks(
            torch.tensor(sum(len(sft_targets(b)) for b in batches), device=self.runtime.device)
        )
        total = torch.zeros((), device=self.runtime.device)
        for i, batch in enumerate(batches):
            with self.runtime.micro_step(self.model, last=i == len(batches) - 1):
                loss = self.token_loss_sum(batch) / targets
                self.runtime.backward(loss)
            total += loss.detach()
        norms = self.runtime.step(self.optimizer, {"model": self.trainable}, self.config.max_grad_norm)
        return {
            "train/loss": self.runtime.sum_over_ranks(total),
            "train/grad_norm": norms["model"],
            "train/lr": self.optimizer.param_groups[0]["lr"],
            "train/epoch": self.step / max(1, self.total_steps) * self.config.epochs,
            "time/tokens_s": sum(int(b.length.sum()) for b in batches) / (time.perf_counter() - started),
        }

    def token_loss_sum(self, batch: Batch) -> Tensor:
        """Sum of the response tokens' losses of a micro-batch, in nats; only their columns meet the vocabulary."""
        ids, att, at = (x.to(self.runtime.device) for x in (batch.ids, batch.att, sft_targets(batch)))
        logits = self.model(ids, att, right_padded=True, at=at)  # (N, V)
        every = torch.ones_like(at, dtype=torch.bool)
        return cross_entropy_sum(logits, ids.flatten()[at + 1], every)[0]

    @torch.no_grad()
    def evaluate(self) -> None:
        """Held-out loss per response token and samples; keeps the best model."""
        self.model.eval()
        loss = count = 0.0
        for part in evaluation_batches(self.validation.lengths, self.config):
            batch = collate_sft([self.validation[i] for i in part], self.tokenizer.pad_id)
            loss += float(self.token_loss_sum(batch))
            count += len(sft_targets(batch))
        metrics = {"eval/loss": loss / count, "eval/perplexity": math.exp(min(50.0, loss / count)), **self.sample()}
        self.log.log(self.step, metrics)
        ends = f", {metrics['resp/eos_rate']:.0%} of samples end" if "resp/eos_rate" in metrics else ""
        tqdm.write(f"step {self.step}: held-out loss {loss / count:.4f} nats/token{ends}")
        if self.step > 0 and loss / count < self.best:
            self.best = loss / count
            self.saver.save_best(self.step, "eval/loss", self.best)

    def sample(self) -> dict[str, float]:
        """Sample answers to held-out prompts at temperature 0.7: does the model end what it says?"""
        room = self.runtime.unwrap(self.model).config.block_size - self.config.sample_tokens
        examples = [self.validation[i].prompt_ids for i in range(min(64, len(self.validation)))]
        prompts = [p[-room:] for p in examples if len(p)] if room > 0 else []
        if not prompts:
            return {}
        with self.runtime.autocast():
            generation = generate(
                self.runtime.unwrap(self.model), prompts, max_new_tokens=self.config.sample_tokens, eos_id=self.tokenizer.eos_id,
                pad_id=self.tokenizer.pad_id, temperature=0.7, seeds=row_seeds(self.config.seed, -1, len(prompts)),
            )  # fmt: skip
        texts = [self.tokenizer.decode(generation.row(b).tolist()) for b in range(len(prompts))]
        self.log.samples(
            self.step,
            [{"prompt": self.tokenizer.decode(p.tolist()), "response": r} for p, r in zip(prompts[:8], texts)],
        )
        degeneracy = text_degeneracy([generation.row(b).tolist() for b in range(len(prompts))])
        return {
            "resp/eos_rate": float(generation.ended.float().mean()),
            "resp/len_mean": float(generation.n.float().mean()),
            **{f"resp/{key}": value for key, value in degeneracy.items()},
        }

    def state(self) -> dict[str, Any]:
        """What a resume needs beside the weights; the data order follows from the step."""
        return trainer_state(self.step, self.best, self.optimizer)


def sft_targets(batch: Batch) -> Tensor:
    """Flattened columns [N] whose logits predict a response token or the EOS; of a text without a prompt, all but the first token."""
    first = batch.prompt_len.clamp(min=1)  # nothing predicts a row's first token
    return state_columns(first, batch.length - first, batch.ids.shape[1])


class RewardModelTrainer:
    """Reward model: pairwise ranking loss over K completions, each forwarded once; then the normalisation PPO relies on."""

    def __init__(
        self, config: RMConfig, model: nn.Module, sft: nn.Module, tokenizer: Tokenizer, train: RankedDataset, validation: RankedDataset,
        run: Path, runtime: Runtime, description: dict[str, Any], state: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.tokenizer, self.runtime, self.run, self.sft = config, tokenizer, runtime, run, sft
        self.train, self.validation = train, validation
        groups = [{"name": "model", "params": list(model.parameters()), "lr": config.lr}]
        optimizer = adamw(groups, (0.9, 0.999), 1e-5, config.weight_decay, runtime.device)
        self.model, self.optimizer = runtime.prepare(model, optimizer)
        self.trainable = trainable(model)
        self.total_steps = optimizer_steps(train.lengths, config)
        self.step, self.best = resume_trainer(state, self.optimizer)
        self.log = MetricsLog(run, self.step)
        self.saver = Saver(run, {"": model}, tokenizer, description, config.keep)
        self.interrupt = Interrupt()

    def fit(self) -> int:
        """Train one epoch, normalise, save; returns the exit code."""
        config = self.config
        with self.interrupt.watch(), tqdm(total=self.total_steps, initial=self.step, desc="RM", unit="step") as bar:
            if self.step == 0:
                self.normalise("before training")
                self.evaluate()
            for prompts in data_order(self.train.lengths, config, self.step, self.total_steps):
                set_lr(
                    self.optimizer,
                    cosine_with_warmup(self.step, 1.0, config.min_lr_ratio, config.warmup_steps, self.total_steps),
                )
                metrics = self.train_step(prompts)
                self.step += 1
                bar.update()
                last = self.step == self.total_steps
                if self.step % config.log_every == 0 or last:
                    bar.set_postfix(loss=f"{self.log.log(self.step, metrics)['train/loss']:.3f}")
                if last:
                    self.normalise("after training")
                if self.step % config.eval_every == 0 or last:
                    self.evaluate()
                if self.step % config.save_every == 0 or (self.interrupt.signal and not last):
                    self.saver.save_step(self.step, self.state())
                if self.interrupt.signal and not last:
                    return stopped(self.run, self.step, self.interrupt)
        return finished(self.saver, self.step, self.state(), self.log)

    def train_step(self, prompts: np.ndarray) -> dict[str, float | Tensor]:
        """One optimizer step on all completions of the given prompts; the figures to log."""
        self.model.train()
        started = time.perf_counter()
        count = self.runtime.sum_over_ranks(torch.tensor(len(prompts), device=self.runtime.device))
        total, right, pairs, tokens = (torch.zeros((), device=self.runtime.device) for _ in range(4))
        parts = micro_batches(prompts, self.config)
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
        norms = self.runtime.step(self.optimizer, {"model": self.trainable}, self.config.max_grad_norm)
        return {
            "train/loss": self.runtime.sum_over_ranks(total),
            "train/accuracy": self.runtime.sum_over_ranks(right) / self.runtime.sum_over_ranks(pairs).clamp(min=1),
            "train/grad_norm": norms["model"],
            "train/lr": self.optimizer.param_groups[0]["lr"],
            "time/tokens_s": float(tokens) / (time.perf_counter() - started),
        }

    def scores(self, batch: RankedBatch) -> tuple[Tensor, Tensor]:
        """Scores [B, K] and their mask, from one forward of every completion."""
        rows, mask = batch.rows.to(self.runtime.device), batch.mask.to(self.runtime.device)
        flat = self.model(rows.ids, rows.att, right_padded=True)  # (all completions,)
        return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat), mask

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out accuracy, calibration and the length baseline; keeps the best model."""
        self.model.eval()
        parts = []
        for part in evaluation_batches(self.validation.lengths, self.config):
            batch = collate_ranked([self.validation[i] for i in part], self.tokenizer.pad_id)
            scores, mask = self.scores(batch)
            response_len = (batch.rows.length - batch.rows.prompt_len).float()
            parts.append((scores.cpu(), torch.zeros(mask.shape).masked_scatter(mask.cpu(), response_len), mask.cpu()))
        width = max(mask.shape[1] for _, _, mask in parts)
        scores, lengths, mask = (torch.cat([F.pad(p[i], (0, width - p[i].shape[1])) for p in parts]) for i in range(3))
        report = ranking_report(scores, lengths, mask)
        self.log.log(self.step, {f"eval/{key}": value for key, value in report.items()})
        tqdm.write(
            f"step {self.step}: held-out accuracy {report['accuracy']:.3f} (chance 0.500, longer wins {report['longer_wins']:.3f}), "
            f"loss {report['nll']:.4f} (chance {math.log(2):.4f}), calibration error {report['ece']:.3f}"
        )
        self.saver.description["held_out"] = {"pairs_of": len(mask), "step": self.step, **report}
        if self.step > 0 and report["nll"] < self.best:
            self.best = report["nll"]
            self.saver.save_best(self.step, "eval/nll", self.best)
        return report

    @torch.no_grad()
    def normalise(self, when: str) -> None:
        """Give the scores of SFT samples mean 0 and deviation 1, with PPO's sampler, temperature and length limit.

        Without it beta, the value clip and the penalty for a missing EOS would mean something else for every reward model.
        """
        model = self.runtime.unwrap(self.model)
        model.eval()
        model.set_normalisation(1.0, 0.0)
        assert model.normalisation == (1.0, 0.0)
        room = model.config.block_size - self.config.response_length
        if room < 1:
            raise ValueError(f"responses of {self.config.response_length} tokens leave no room for a prompt")
        order = np.random.default_rng(self.config.seed).permutation(len(self.train))[: self.config.normalise_prompts]
        prompts = [self.train[i].prompt_ids[0][-room:] for i in order]
        scores = []
        seeds = row_seeds(self.config.seed, -2, len(prompts))
        for start in range(0, len(prompts), 64):
            with self.runtime.autocast():
                generation = generate(
                    self.sft, prompts[start : start + 64], max_new_tokens=self.config.response_length, eos_id=self.tokenizer.eos_id,
                    pad_id=self.tokenizer.pad_id, temperature=self.config.temperature, seeds=seeds[start : start + 64],
                )  # fmt: skip
                rows = compact(generation, self.tokenizer.pad_id, self.runtime.device)
                scores.append(model(rows.ids, rows.att, right_padded=True))
        raw = torch.cat(scores)
        gain, bias = reward_affine(raw)
        model.set_normalisation(float(gain), float(bias))
        self.log.log(
            self.step, {"norm/raw_mean": raw.mean(), "norm/raw_sd": raw.std(), "norm/gain": gain, "norm/bias": bias}
        )
        tqdm.write(
            f"{when}: raw scores of {len(raw)} SFT samples have mean {raw.mean():.3f}, deviation {raw.std():.3f}; normalised to 0 and 1"
        )

    def state(self) -> dict[str, Any]:
        """What a resume needs beside the weights; the data order follows from the step."""
        return trainer_state(self.step, self.best, self.optimizer)


class PPOTrainer:
    """PPO: sample, score, estimate advantages, then several passes of clipped updates (Schulman et al. 2017; Ziegler et al. 2019)."""

    def __init__(
        self, config: PPOConfig, actor: nn.Module, critic: nn.Module, reference: nn.Module, reward_model: nn.Module | None,
        tokenizer: Tokenizer, train: PromptDataset, validation: PromptDataset, run: Path, runtime: Runtime,
        description: dict[str, Any], reward_fn: ScoreTexts | None = None, eval_reward_fn: ScoreTexts | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.tokenizer, self.runtime, self.run = config, tokenizer, runtime, run
        self.train, self.validation, self.eval_reward_fn = train, validation, eval_reward_fn
        self.parameters = {"actor": trainable(actor), "critic": trainable(critic)}
        groups = [
            {"name": "actor", "params": self.parameters["actor"], "lr": config.lr},
            {"name": "critic", "params": self.parameters["critic"], "lr": config.critic_lr},
        ]
        optimizer = adamw(groups, (0.9, 0.999), 1e-5, config.weight_decay, runtime.device)
        self.policy, self.optimizer = runtime.prepare(ActorCritic(actor, critic), optimizer)
        self.frozen = {"reference": reference} | ({"reward model": reward_model} if reward_model is not None else {})
        self.rollouts = Rollouts(
            self.policy, reference, reward_model, reward_fn, config.reward_fn_weight, tokenizer, runtime, config.temperature,
            config.response_length,
        )  # fmt: skip
        self.total_steps = min(config.iterations, config.max_steps or config.iterations)
        self.step, self.best = resume_trainer(state, self.optimizer)
        self.kl_coef = state["kl_coef"] if state else config.kl_coef
        self.log = MetricsLog(run, self.step)
        self.saver = Saver(run, {"": actor, "critic": critic}, tokenizer, description, config.keep)
        self.interrupt = Interrupt()

    def fit(self) -> int:
        """Run all iterations, or up to a signal; returns the exit code."""
        config = self.config
        before = {name: parameter_hash(model) for name, model in self.frozen.items()}
        with self.interrupt.watch(), tqdm(total=self.total_steps, initial=self.step, desc="PPO", unit="it") as bar:
            if self.step == 0:
                self.evaluate()
            while self.step < self.total_steps:
                update = self.step + 1
                warm = min(1.0, update / config.warmup_iterations) if config.warmup_iterations else 1.0
                set_lr(
                    self.optimizer,
                    warm * linear_to_zero(update, self.total_steps),
                    frozen="actor" if update <= config.critic_warmup else None,
                )
                metrics = self.iteration(update)
                self.step = update
                bar.update()
                values = self.log.log(self.step, metrics)
                bar.set_postfix(
                    {k: f"{values[f'objective/{k}']:.2f}" for k in ("score", "kl")}
                    | {"len": f"{values['resp/len_mean']:.0f}"}
                )
                last = self.step == self.total_steps
                if self.step % config.eval_every == 0 or last:
                    self.evaluate()
                if self.step % config.save_every == 0 or (self.interrupt.signal and not last):
                    self.saver.save_step(self.step, self.state())
                if self.interrupt.signal and not last:
                    return stopped(self.run, self.step, self.interrupt)
        check_frozen(before, {name: parameter_hash(model) for name, model in self.frozen.items()})
        return finished(self.saver, self.step, self.state(), self.log)

    def iteration(self, update: int) -> dict[str, float | Tensor]:
        """One rollout and the updates on it; the figures to log."""
        config = self.config
        clock = [time.perf_counter()]
        rows = prompt_order(len(self.train), config.global_batch_size, config.seed, update)
        experience = self.rollouts.sample([self.train[i] for i in rows], row_seeds(config.seed, update, len(rows)))
        clock.append(time.perf_counter())

        plans = self.plans(experience, update)
        self.policy.train()  # no role has dropout, so this changes no figure; the first-minibatch check would tell
        self.rollouts.look(experience, [part for minibatch in plans[0] for part in minibatch])
        if update == 1:
            check_reference(experience, self.runtime.dtype)
        penalised = penalise_missing_eos(experience.scores, experience.ended, config.missing_eos_penalty)
        rewards = per_token_rewards(
            penalised, experience.logp, experience.logp_ref, experience.n.to(penalised.device), self.kl_coef
        )
        if config.whiten_rewards:
            stats = self.moments_over_ranks(rewards, experience.rmask)
            rewards = masked_whiten(rewards, experience.rmask, shift_mean=False, stats=stats)
        advantages, returns = gae(rewards, experience.values, experience.rmask, config.gamma, config.lam)
        whitened = masked_whiten(
            advantages, experience.rmask, stats=self.moments_over_ranks(advantages, experience.rmask)
        )
        metrics = rollout_metrics(experience, penalised, self.kl_coef) | value_metrics(
            experience.values, returns, advantages, experience.rmask
        )
        clock.append(time.perf_counter())

        metrics |= self.update(experience, whitened, returns, plans)
        metrics |= {f"{key}_lr": self.lr_of(key) for key in ("actor", "critic")}
        clock.append(time.perf_counter())
        if config.kl_target:
            episodes = len(rows) * self.runtime.world_size
            kl = float(self.runtime.sum_over_ranks(metrics["objective/kl"])) / self.runtime.world_size
            self.kl_coef = adaptive_kl_coef(self.kl_coef, kl, config.kl_target, episodes, config.kl_horizon)
        tokens = int(experience.n.sum())
        spent = dict(zip(("rollout", "score", "update"), np.diff(clock)))
        return metrics | {f"time/{k}_s": v for k, v in spent.items()} | {
            "time/rollout_tokens_s": tokens / spent["rollout"], "time/tokens_s": tokens / (clock[-1] - clock[0]),
        }  # fmt: skip

    def update(
        self, experience: Experience, advantages: Tensor, returns: Tensor, plans: list
    ) -> dict[str, float | Tensor]:
        """ppo_epochs x minibatches optimizer steps; micro-batches only accumulate."""
        config = self.config
        epochs, norms = [], []  # epochs: one (PolicyStats, ValueStats) per pass
        for plan in plans:
            stats_of_pass = []
            for minibatch in plan:
                stats = self.optimizer_step(experience, advantages, returns, minibatch, norms)
                stats_of_pass.append(stats)
                if config.kl_stop and kl_stop_reached(float(stats[0].means()["approx_kl"]), config.kl_stop):
                    break
            epochs.append(add_all(stats_of_pass))
            if len(stats_of_pass) < len(plan):
                break
        policy, value = add_all(epochs)
        metrics = update_metrics(policy.means(), value.means())
        metrics |= {f"policy/approxkl_epoch{e + 1}": stats[0].means()["approx_kl"] for e, stats in enumerate(epochs)}
        metrics |= {f"grad_norm/{name}": torch.stack([n[name] for n in norms]).mean() for name in self.parameters}
        return metrics | {"train/optimizer_steps": len(norms)}

    def optimizer_step(
        self, experience: Experience, advantages: Tensor, returns: Tensor, minibatch: list[np.ndarray], norms: list
    ) -> tuple[PolicyStats, ValueStats]:
        """One step on a minibatch: each micro-batch adds its share of the minibatch's token mean. Appends the gradient norms to `norms`."""
        config = self.config
        tokens = sum(int(experience.n[part].sum()) for part in minibatch)
        denom = self.runtime.sum_over_ranks(torch.tensor(tokens, device=self.runtime.device))
        stats = []
        for i, part in enumerate(minibatch):
            batch = experience.micro_batch(part)
            rows, T = batch.rows, batch.rmask.shape[1]
            with self.runtime.micro_step(self.policy, last=i == len(minibatch) - 1):
                logp, values, _ = self.policy(batch, config.temperature)
                pi = policy_loss(
                    logp, experience.logp[rows, :T], advantages[rows, :T], batch.rmask, config.clip_eps, denom
                )
                v = value_loss(
                    values,
                    experience.values[rows, :T],
                    returns[rows, :T],
                    batch.rmask,
                    config.value_clip_eps or math.inf,
                    denom,
                )
                self.runtime.backward(pi.loss + config.vf_coef * v.loss)
            stats.append((pi.stats, v.stats))
        policy, value = (
            type(x)(self.runtime.sum_over_ranks(x.sums), self.runtime.max_over_ranks(x.maxima)) for x in add_all(stats)
        )
        if not norms:
            check_first_minibatch(policy.means(), value.means(), self.runtime.dtype)
        norms.append(self.runtime.step(self.optimizer, self.parameters, config.max_grad_norm))
        return policy, value

    def plans(self, experience: Experience, update: int) -> list[list[list[np.ndarray]]]:
        """The minibatches of every pass, drawn before the old log-probabilities are taken so that these see the first pass's batches."""
        generator = np.random.default_rng([self.config.seed, 1, update])
        length = experience.prompt_len + experience.n
        config = self.config
        return [
            minibatch_plan(length, config.minibatches, config.batch_size, generator) for _ in range(config.ppo_epochs)
        ]

    @torch.no_grad()
    def evaluate(self) -> None:
        """Score, KL and length on fixed held-out prompts with fixed sampling seeds; keeps the best model."""
        config = self.config
        count = min(config.eval_examples, len(self.validation))
        parts = [
            self.evaluate_part(range(i, min(i + config.global_batch_size, count)))
            for i in range(0, count, config.global_batch_size)
        ]
        rows = {key: torch.cat([part[key] for part in parts]) for key in parts[0] if key != "texts"}
        score, kl = rows["penalised"].mean(), rows["kl"].mean()
        reward = float(score - config.kl_coef * kl)
        metrics = {
            "eval/score": rows["score"].mean(), "eval/kl": kl, "eval/rlhf_reward": reward, "eval/len_mean": rows["n"].mean(),
            "eval/eos_rate": rows["ended"].mean(), **({"eval/gold": rows["gold"].mean()} if "gold" in rows else {}),
        }  # fmt: skip
        values = self.log.log(self.step, metrics)
        tqdm.write(
            f"iteration {self.step}: held-out "
            + ", ".join(f"{key.removeprefix('eval/')} {value:.3f}" for key, value in values.items())
        )
        shown = [
            {
                "prompt": p,
                "response": r,
                "score": round(float(s), 3),
                "kl": round(float(k), 3),
                "tokens": int(n),
                "top_kl_tokens": top,
            }
            for (p, r, top), s, k, n in zip(parts[0]["texts"][:8], rows["score"], rows["kl"], rows["n"])
        ]
        self.log.samples(self.step, shown)
        if self.step > 0 and reward > -self.best:
            self.best = -reward
            self.saver.save_best(self.step, "eval/rlhf_reward", reward)

    def evaluate_part(self, indices: range) -> dict[str, Any]:
        """Per-response figures of some held-out prompts."""
        experience = self.rollouts.sample(
            [self.validation[i] for i in indices], row_seeds(self.config.seed, -3, indices.stop)[indices.start :]
        )
        length = experience.prompt_len + experience.n
        self.rollouts.look(experience, minibatch_plan(length, 1, self.config.batch_size, np.random.default_rng(0))[0])
        k1 = kl_k1(experience.logp, experience.logp_ref)
        prompts, responses = self.rollouts.texts(experience)
        decode = self.tokenizer.decode
        top = [
            [
                f"{decode([ids[j]])!r} {float(row[j]):.2f}"
                for j in row[: len(ids)].topk(min(3, len(ids))).indices.tolist()
            ]
            for ids, row in zip(experience.responses()[:8], k1[:8].cpu())
        ]
        figures = {
            "score": experience.scores, "kl": masked_sum(k1, experience.rmask, dim=1), "ended": experience.ended.float(),
            "penalised": penalise_missing_eos(experience.scores, experience.ended, self.config.missing_eos_penalty),
            "n": experience.n.float(),
        }  # fmt: skip
        if self.eval_reward_fn is not None:
            figures["gold"] = torch.tensor(self.eval_reward_fn(prompts, responses))
        return {key: value.cpu() for key, value in figures.items()} | {"texts": list(zip(prompts, responses, top))}

    def moments_over_ranks(self, x: Tensor, mask: Tensor) -> Moments:
        """Count, sum and sum of squares of the whole rollout batch of all ranks."""
        return Moments(*self.runtime.sum_over_ranks(torch.stack(masked_moments(x, mask))))

    def lr_of(self, group: str) -> float:
        """Current learning rate of the actor or the critic."""
        return next(g["lr"] for g in self.optimizer.param_groups if g["name"] == group)

    def state(self) -> dict[str, Any]:
        """What a resume needs beside the weights; prompts and sampling seeds follow from the iteration."""
        return trainer_state(self.step, self.best, self.optimizer) | {"kl_coef": self.kl_coef}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model that train."""
    return [p for p in model.parameters() if p.requires_grad]


def add_all(stats: list[tuple[PolicyStats, ValueStats]]) -> tuple[PolicyStats, ValueStats]:
    """Statistics of several micro-batches, minibatches or passes together."""
    policy, value = zip(*stats)
    return sum(policy[1:], policy[0]), sum(value[1:], value[0])
