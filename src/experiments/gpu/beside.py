"""Part 4 of `-t gpu`: transformers beside ours with the same weights and sizes: sampling, and a compiled SFT step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from config.configs import SFTConfig
from config.model_configs import get_configs
from experiments.bench.ours import prepared_sampling, prepared_step, random_ids, stage_config, step_tokens, synchronise
from experiments.bench.work import NOT_AN_ID, Work
from experiments.gpu.card import Card
from experiments.gpu.report import Report
from experiments.gpu.rows import OF_BANDWIDTH, decoding, presets
from experiments.gpu.works import Prepared, Sizes, language_model, make_models, work_of
from experiments.markdown import table
from models.generation import generate
from training.engine.runtime import Runtime

PRESETS, TINY = ("gpt2", "smollm2-135m"), ("gpt2-nano", "llama-nano")
TIMES, STEP_TIMES = 5.0, 1.0
COMPILING = 60  # seconds that a compiled step needs to begin with


def compare_all_sampling(card: Card, tiny: bool, report: Report, left: Callable[[], float]) -> None:
    """Sampling of each family, while there is time."""
    compare("sampling", compare_sampling, 0.0, card, tiny, report, left)


def compare_all_steps(card: Card, tiny: bool, report: Report, left: Callable[[], float]) -> None:
    """The SFT step of each family, while there is time."""
    compare("SFT", compare_steps, 0.0 if tiny else COMPILING, card, tiny, report, left)


def compare(
    kind: str, job: Callable[..., dict[str, Any]], least: float, card: Card, tiny: bool, report: Report,
    left: Callable[[], float],
) -> None:  # fmt: skip
    """One kind of work with each preset; `least` seconds have to be left for it."""
    found: dict[str, Any] = report.data.get(4, {}).get("rows", {})
    for preset in presets(TINY if tiny else PRESETS):
        name = f"{preset} {kind}"
        if left() <= least:
            report.skip(4, name, "the time was up")
            continue
        card.free()
        try:
            found[name] = job(preset, card, tiny, report)
        except Exception as error:  # the other comparisons are made all the same
            report.fail(4, name, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}")
        torch.compiler.reset()  # it would keep the compiled model, which the memory of later rows would count
        report.save(4, {"rows": found}, {"ours and transformers": as_table(found)})
    report.save(4, {"rows": found})


def as_table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown of all comparisons."""
    lines = [
        (name, f"{row['ours_tokens_s']:,.0f}", f"{row['peer_tokens_s']:,.0f}", f"{row['ratio']:.2f}x", row["note"])
        for name, row in found.items()
    ]
    return table("work | ours, tokens/s | transformers, tokens/s | ratio | note", lines)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


def compare_sampling(preset: str, card: Card, tiny: bool, report: Report) -> dict[str, Any]:
    """`generate` of both sides with the same weights in half precision; and our step beside the bandwidth's bound."""
    work, model = work_of(preset, "sampling", card, tiny), language_model(preset, card)
    once = prepared_sampling(work, model)
    seconds = card.seconds(once)
    step = decoding(Prepared(work, once, Sizes.of(model), model), seconds, card)
    peer = same_in_transformers(model, next(model.parameters()).dtype)
    peer_once = peer_sampling(work, peer, card)
    peer_seconds = card.seconds(peer_once, repeats=2)
    same, tokens, ratio = same_greedy(work, model, peer), work.batch * work.new, peer_seconds / seconds
    figure = f"{tokens / seconds:,.0f} against {tokens / peer_seconds:,.0f} tokens/s: {ratio:.2f}x"
    report.say(4, f"{work.name}, transformers", figure, f"{TIMES:g}x", ratio >= TIMES)
    figure = f"{1e3 * step['step_seconds']:.2f} ms, bound {1e3 * step['step_bound']:.2f} ms: {step['of_bandwidth']:.0%}"
    report.say(4, f"{work.name}, a step", figure, f"{OF_BANDWIDTH:.0%}", step["of_bandwidth"] >= OF_BANDWIDTH)
    return step | {
        "ours_tokens_s": tokens / seconds, "peer_tokens_s": tokens / peer_seconds, "ratio": ratio,
        "same_greedy_tokens": same, "note": f"{same:.0%} of the greedy tokens are the same",
    }  # fmt: skip


def same_in_transformers(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same model in transformers, on the same device, by way of a folder in its form."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    with TemporaryDirectory() as name:
        model.save_pretrained(Path(name), dtype=dtype)
        peer = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    peer.generation_config.eos_token_id = None  # every row takes its full length
    peer.generation_config.pad_token_id = 0
    return peer.to(next(model.parameters()).device).eval()


def peer_sampling(work: Work, peer: nn.Module, card: Card) -> Callable[[], None]:
    """`generate` with its default cache, drawing from the whole distribution as ours does."""
    prompts = torch.as_tensor(random_ids(work.batch, work.prompt, peer.config.vocab_size), device=card.device).long()
    everything = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=work.new)

    def once() -> None:
        with torch.inference_mode():
            out = peer.generate(prompts, attention_mask=torch.ones_like(prompts), **everything)
        synchronise(card.device)
        if out.shape[1] != work.prompt + work.new:
            raise RuntimeError(f"{out.shape[1] - work.prompt} tokens were sampled, expected {work.new}")

    return once


def same_greedy(work: Work, model: nn.Module, peer: nn.Module) -> float:
    """Share of a few rows' greedy tokens on which both sides agree; rounding parts them after some tokens."""
    rows, new = min(8, work.batch), min(8, work.new)
    ids = random_ids(rows, work.prompt, model.config.vocab_size)
    ours = generate(model, ids, max_new_tokens=new, eos_id=NOT_AN_ID, temperature=0).responses
    prompts = torch.as_tensor(ids, device=ours.device).long()
    theirs = peer.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=new)
    return float((ours == theirs[:, work.prompt :]).float().mean())


# ---------------------------------------------------------------------------------------------------------------------
# SFT
# ---------------------------------------------------------------------------------------------------------------------


def compare_steps(preset: str, card: Card, tiny: bool, report: Report) -> dict[str, Any]:
    """An SFT step of both sides on the same rows in one pass, transformers' compiled."""
    work = work_of(preset, "sft", card, tiny)
    whole = replace(stage_config(work), tokens_per_micro_batch=0, batch_size=work.batch)
    runtime = Runtime(whole.device, whole.dtype, whole.seed)
    model = make_models(whole, get_configs(preset), runtime)[0]
    peer = same_in_transformers(model, torch.float32)
    seconds = our_step_seconds(work, whole, runtime, model, card)
    del model
    card.free()
    started = time.perf_counter()
    peer_once = peer_step(work, peer, card)
    peer_once()
    compiling = time.perf_counter() - started
    peer_seconds, tokens = card.seconds(peer_once), step_tokens(work)
    ratio = peer_seconds / seconds
    figure = f"{tokens / seconds:,.0f} against {tokens / peer_seconds:,.0f} tokens/s compiled: {ratio:.2f}x"
    report.say(4, f"{work.name}, transformers", figure, f"{STEP_TIMES:g}x", ratio >= STEP_TIMES)
    return {
        "ours_tokens_s": tokens / seconds, "peer_tokens_s": tokens / peer_seconds, "ratio": ratio,
        "peer_compiling_s": compiling, "note": f"its first step took {compiling:.0f} s",
    }  # fmt: skip


def our_step_seconds(work: Work, config: SFTConfig, runtime: Runtime, model: nn.Module, card: Card) -> float:
    """Seconds of our SFT step."""
    with TemporaryDirectory() as folder:
        return card.seconds(prepared_step(work, config, runtime, [model], Path(folder)), work.warmup)


def peer_step(work: Work, peer: nn.Module, card: Card) -> Callable[[], None]:
    """transformers' own loss, compiled, in autocast; clipping and fused AdamW as in the benchmark of `-t bench`."""
    peer.train().requires_grad_(True)
    for name in [name for name in vars(peer.config) if name.endswith("pdrop") or name == "attention_dropout"]:
        setattr(peer.config, name, 0.0)
    for module in peer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW(peer.parameters(), lr=5e-5, weight_decay=0.0, fused=True)
    ids = torch.as_tensor(random_ids(work.batch, work.prompt + work.new, peer.config.vocab_size), device=card.device)
    ids = ids.long()
    # A CPU's compiler would take longer than the whole rehearsal.
    running = torch.compile(peer, backend="inductor" if card.gpu else "eager")
    autocast = torch.autocast(card.device, torch.float16 if card.dtype == "fp16" else torch.bfloat16)
    scaler = torch.amp.GradScaler(card.device, enabled=card.dtype == "fp16")

    def once() -> None:
        with autocast:
            loss = running(ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        synchronise(card.device)

    return once
