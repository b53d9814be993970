"""How the three models do on held-out data: figures over all of it, and texts of the first few prompts.

Shapes: N prompts, K completions of a prompt, T response columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from config.configs import SFTConfig
from training import loop
from training.engine.runtime import Runtime
from training.experience import Experience, Rollouts, ScoreTexts, split_minibatches
from training.sampling import SFT_SAMPLES, Sampler
from utils.data.batching import RankedBatch
from utils.dataset import SFTDataset
from utils.loss import kl_k1, masked_sum, penalise_missing_eos
from utils.metrics import ranking_report, text_degeneracy
from utils.template import PromptTemplate
from utils.tokenizer import Tokenizer

_SHOWN, _TOP_TOKENS = 8, 3


def answer_prompts(
    model: nn.Module, validation: SFTDataset, config: SFTConfig, tokenizer: Tokenizer, runtime: Runtime,
    template: PromptTemplate | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """`sample_answers` to the first held-out prompts at temperature 0.7, cut so that --sample-tokens fit behind them;
    nothing of texts without prompts."""
    room = model.config.block_size - config.sample_tokens
    count = min(SFT_SAMPLES, config.eval_examples, len(validation))
    examples = [validation[i].prompt_ids for i in range(count)]
    prompts = [p[-room:] for p in examples if len(p)] if room > 0 else []
    if not prompts:
        return {}, []
    sampler = Sampler.of(config, tokenizer, runtime, 0.7, config.sample_tokens)
    sampler = replace(sampler, template=template or PromptTemplate())
    seeds = loop.row_seeds(config.seed, loop.SFT_SAMPLES, len(prompts))
    return sample_answers(model, prompts, seeds, sampler)


def sample_answers(
    model: nn.Module, prompts: Sequence[np.ndarray], seeds: Sequence[int], sampler: Sampler
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """One sampled answer to each prompt: figures resp/* (does the model end what it says?), rows for samples.jsonl."""
    rows = sampler.sample(model, prompts, seeds)
    decode, responses = sampler.tokenizer.decode, rows.responses(with_eos=False)
    asked = [sampler.template.decode_prompt(sampler.tokenizer, p) for p in prompts[:_SHOWN]]
    shown = [{"prompt": p, "response": decode(r)} for p, r in zip(asked, responses)]
    figures = {
        "resp/eos_rate": float(rows.ended.float().mean()),
        "resp/len_mean": float(rows.n.float().mean()),
        **{f"resp/{key}": value for key, value in text_degeneracy(responses).items()},
    }
    return figures, shown


def evaluate_ranking(
    batches: Sequence[RankedBatch], scores_of: Callable[[RankedBatch], tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """`ranking_report` of a reward model over all batches; `scores_of` gives scores [B, K] and their mask."""
    per_batch = []
    for batch in tqdm(batches, desc="evaluating", unit="batch", leave=False, delay=3):
        scores, mask = (x.cpu() for x in scores_of(batch))
        response_len = (batch.rows.length - batch.rows.prompt_len).float()
        per_batch.append((scores, torch.zeros(mask.shape).masked_scatter(mask, response_len), mask))
    width = max(mask.shape[1] for *_, mask in per_batch)
    return ranking_report(*(torch.cat([F.pad(x, (0, width - x.shape[1])) for x in xs]) for xs in zip(*per_batch)))


def ranking_in_words(report: dict[str, float]) -> str:
    """The figures of `evaluate_ranking` that tell most."""
    return (
        f"accuracy {report['accuracy']:.3f} (chance 0.500, longer wins {report['longer_wins']:.3f}), loss "
        f"{report['nll']:.4f} (chance {math.log(2):.4f}), calibration error {report['ece']:.3f}"
    )


def evaluate_policy(
    rollouts: Rollouts, prompts: Sequence[np.ndarray], seeds: Sequence[int], gold: ScoreTexts | None
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Sample one response to each prompt and have all roles evaluate it.

    Args:
        rollouts: with the policy to evaluate.
        prompts: N held-out prompts. seeds: one per prompt; the same ones at every evaluation.
        gold: a reward that is reported and never trained on.

    Returns:
        Figures eval/* (eval/rlhf_reward is what PPO maximises, at the run's first KL coefficient so that all
        evaluations compare), and rows for samples.jsonl.
    """
    config = rollouts.config
    experience = rollouts.sample(prompts, seeds)
    sizes = (1, config.batch_size, np.random.default_rng(0), config.tokens_per_micro_batch)
    rollouts.evaluate_roles(experience, split_minibatches(experience.lengths, *sizes)[0])
    k1 = kl_k1(experience.logp, experience.logp_ref)
    kl = masked_sum(k1, experience.rmask, dim=1)  # (N,) nats per response
    penalised = penalise_missing_eos(experience.scores, experience.ended, config.missing_eos_penalty)
    texts = rollouts.texts(experience)
    figures = {
        "eval/score": float(experience.scores.mean()),
        "eval/kl": float(kl.mean()),
        "eval/rlhf_reward": float((penalised - config.kl_coef * kl).mean()),
        "eval/len_mean": float(experience.n.float().mean()),
        "eval/eos_rate": float(experience.ended.float().mean()),
    }
    if gold is not None:
        figures["eval/gold"] = float(np.mean(gold(*texts)))
    shown = [
        {
            "prompt": prompt,
            "response": response,
            "score": round(float(experience.scores[row]), 3),
            "kl": round(float(kl[row]), 3),
            "tokens": int(experience.n[row]),
            "top_kl_tokens": top,
        }
        for row, (prompt, response, top) in enumerate(zip(*texts, _top_tokens(rollouts, experience, k1)))
    ]
    return figures, shown


def _top_tokens(rollouts: Rollouts, experience: Experience, k1: Tensor) -> list[list[str]]:
    """Of the first responses, the tokens that moved farthest from the reference, with their log-ratios in nats."""
    tokenizer, top = rollouts.tokenizer, []
    for ids, row in zip(experience.responses()[:_SHOWN], k1[:_SHOWN].cpu()):
        largest = torch.topk(row[: len(ids)], min(_TOP_TOKENS, len(ids))).indices.tolist()
        names = ["EOS" if ids[j] == tokenizer.eos_id else repr(tokenizer.decode([ids[j]])) for j in largest]
        top.append([f"{name} {float(row[j]):.2f}" for name, j in zip(names, largest)])
    return top
