"""The benchmark's other side: one function per peer, in the environment of `make bench`, as a process of its own.

Nothing of this project is used but the description of the work. What each peer does is what its documentation shows,
with the faster choice wherever it leaves one: no gradient checkpointing, no dropout, fused AdamW.

A tuned peer is also given what ours has: its memory allocator's settings (bench.py), every matrix product in bf16, and
frozen weights in bf16; and it samples in inference mode.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from experiments.bench.work import PRODUCT, Work, median_seconds, run_child

if TYPE_CHECKING:
    import torch

_TRANSFORMERS = ("torch", "transformers")
_TRL = (*_TRANSFORMERS, "trl", "peft", "accelerate")
PACKAGES = {
    **dict.fromkeys(("transformers", "transformers_eager", "transformers_compiled"), _TRANSFORMERS),
    **dict.fromkeys(("trl", "trl_critic"), _TRL),
    "nanogpt_compiled": ("torch",),
}
NANOGPT = "NANOGPT_FOLDER"


def absence(peer: str) -> str:
    """Why a peer cannot be measured in this environment; "" when it can."""
    for package in PACKAGES[peer]:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            return f"{package} is not installed: make bench"
    if peer.startswith("nanogpt") and not (Path(os.environ.get(NANOGPT, "")) / "model.py").is_file():
        return "nanoGPT is a repository, not a package: clone it and give --nanogpt FOLDER"
    return ""


def peer_config(work: Work):
    """The transformers configuration of the work's model, without dropout."""
    from transformers import GPT2Config, LlamaConfig

    sizes = work.sizes
    end = sizes["vocab_size"] - 1
    same = dict(vocab_size=end + 1, num_labels=1, bos_token_id=end, eos_token_id=end, pad_token_id=end)
    if sizes["family"] == "gpt2":
        same |= {key: sizes[key] for key in ("n_layer", "n_head", "n_embd")}
        return GPT2Config(n_positions=sizes["block_size"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **same)
    rope = {"rope_type": "default", "rope_theta": sizes["rope_theta"]}  # a stretch costs nothing
    return LlamaConfig(
        hidden_size=sizes["n_embd"], intermediate_size=sizes["n_inner"], num_hidden_layers=sizes["n_layer"],
        num_attention_heads=sizes["n_head"], num_key_value_heads=sizes["n_kv_head"], head_dim=sizes["head_dim"],
        max_position_embeddings=sizes["block_size"], tie_word_embeddings=sizes["tied"], rope_parameters=rope, **same,
    )  # fmt: skip


def language_model(work: Work):
    """transformers' language model with random weights."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(peer_config(work))


def random_ids(rows: int, length: int, vocab_size: int) -> torch.Tensor:
    """[rows, length] int64 ids, the last id of the vocabulary (EOS) not among them."""
    import torch

    return torch.randint(vocab_size - 1, (rows, length), generator=torch.Generator().manual_seed(0))


def product_types():
    """A context that notes in `seen` the types of all matrix products, as torch carries them out."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class ProductTypes(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[str] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if PRODUCT.fullmatch(func._schema.name):
                self.seen.add(str(args[1].dtype).removeprefix("torch."))
            return func(*args, **(kwargs or {}))

    return ProductTypes()


def transformers_sampling(work: Work) -> dict[str, Any]:
    """Tokens per second of `generate` with its default cache, all weights in bf16."""
    import torch

    torch.manual_seed(0)
    model = language_model(work).to(torch.bfloat16).eval()
    model.generation_config.eos_token_id = None  # every row takes its full length
    prompts = random_ids(work.batch, work.prompt, model.config.vocab_size)
    everything = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=work.new)

    def once() -> None:
        with torch.inference_mode(work.tuned):  # quicker than the no_grad that `generate` has by itself
            out = model.generate(prompts, attention_mask=torch.ones_like(prompts), **everything)
        if out.shape[1] != work.prompt + work.new:
            raise RuntimeError(f"{out.shape[1] - work.prompt} tokens were sampled, expected {work.new}")

    with product_types() as types:
        once()
    return {"value": work.batch * work.new / median_seconds(work, once), "types": sorted(types.seen)}


def sft_model(work: Work) -> tuple[torch.nn.Module, Callable]:
    """The peer's model, and its own loss of (model, ids); nanoGPT's wants inputs and targets apart."""
    if not work.peer.startswith("nanogpt"):
        return language_model(work), lambda model, ids: model(ids, labels=ids).loss
    sys.path.insert(0, os.environ[NANOGPT])
    from model import GPT, GPTConfig  # nanoGPT's model.py

    sizes = {key: work.sizes[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")}
    model = GPT(GPTConfig(**sizes, dropout=0.0, bias=True))
    return model, lambda model, ids: model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())[1]


def sft(work: Work) -> dict[str, Any]:
    """Tokens per second of a step: the loss, gradient clipping, AdamW; compiled when the peer's name says so."""
    import torch

    torch.manual_seed(0)
    model, loss_of = sft_model(work)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0, fused=True)
    ids = random_ids(work.batch, work.prompt + work.new, work.sizes["vocab_size"])
    running = torch.compile(model) if work.peer.endswith("_compiled") else model

    def once() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(running, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with product_types() as types, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss_of(model, ids[:1])
    return {"value": ids.numel() / median_seconds(work, once), "types": sorted(types.seen)}


def trl_ppo(work: Work) -> dict[str, Any]:
    """Seconds of an iteration of TRL's PPOTrainer: rollout, scores, `epochs` optimizer steps on the whole batch.

    By itself the trainer knows bf16 in the forward passes of the update alone, and samples and scores in fp32.
    """
    # TRL's own bf16 flag does not reach the Accelerator that its PPOTrainer makes; this does.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    import torch
    from trl.experimental.ppo import PPOTrainer

    torch.manual_seed(0)
    iterations = work.warmup + work.repeats
    clock, steps, types = [time.perf_counter()], [], product_types()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        trainer = PPOTrainer(
            args=trl_settings(work, iterations, folder), **trl_models(work),
            processing_class=end_tokenizer(work.sizes["vocab_size"] - 1), callbacks=[end_of_iteration(clock, types)],
            train_dataset=prompt_dataset(work, iterations), eval_dataset=prompt_dataset(work, 1),
        )  # fmt: skip

        def after_step(*_) -> None:
            steps.append(1)
            # Autocast keeps its bf16 copies of weights until its outermost context ends: they are old now.
            torch.clear_autocast_cache()

        trainer.optimizer.optimizer.register_step_post_hook(after_step)
        with torch.autocast("cpu", torch.bfloat16, enabled=work.tuned):
            types.__enter__()  # until the first iteration, which is not timed, ends
            trainer.train()
    if len(steps) != work.epochs * iterations:
        raise RuntimeError(f"{len(steps)} optimizer steps in {iterations} iterations, expected {work.epochs} each")
    seconds = median(b - a for a, b in zip(clock[work.warmup :], clock[work.warmup + 1 :]))
    return {"value": seconds, "types": sorted(types.seen)}


def trl_models(work: Work) -> dict[str, Any]:
    """The roles by TRL's names for them; with LoRA the reference is the policy with its adapters off.

    `peft_config` gives the policy adapters and leaves the critic to train in full, as TRL documents it; `trl_critic`
    gives PEFT's adapters to the critic too, so that both sides train alike.
    """
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModelForSequenceClassification

    is_gpt2 = work.sizes["family"] == "gpt2"
    policy = language_model(work)
    value, reward = (AutoModelForSequenceClassification.from_config(peer_config(work)) for _ in range(2))
    reward.requires_grad_(False)
    reference, peft = None, None
    if work.preset.endswith("/lora"):
        adapters = {"r": work.sizes["lora_rank"], "lora_alpha": work.sizes["lora_alpha"], "fan_in_fan_out": is_gpt2}
        adapters |= {"target_modules": ["c_attn", "c_proj", "c_fc"] if is_gpt2 else "all-linear"}
        peft = LoraConfig(**adapters, task_type="CAUSAL_LM")
        policy.requires_grad_(False)  # PEFT would do it: the adapters to come train
        if work.peer == "trl_critic":
            inject_adapter_in_model(LoraConfig(**adapters), value)
            value.score.requires_grad_(True)
    else:
        reference = language_model(work).requires_grad_(False)
        reference.load_state_dict(policy.state_dict())
    roles = {"model": policy, "ref_model": reference, "reward_model": reward, "value_model": value}
    for parameter in (p for model in roles.values() if model is not None for p in model.parameters()):
        if work.tuned and not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return roles | {"peft_config": peft}


def trl_settings(work: Work, iterations: int, folder: str):
    """TRL's settings for the work: one minibatch of all rows per epoch, losses and penalties at its defaults."""
    from trl.experimental.ppo import PPOConfig

    return PPOConfig(
        output_dir=folder, use_cpu=True, bf16=True, gradient_checkpointing=False, report_to=[], save_strategy="no",
        disable_tqdm=True, logging_steps=1, num_sample_generations=0, per_device_train_batch_size=work.batch,
        gradient_accumulation_steps=1, num_mini_batches=1, num_ppo_epochs=work.epochs,
        local_rollout_forward_batch_size=work.batch, total_episodes=work.batch * iterations, temperature=1.0,
        response_length=work.new,
    )  # fmt: skip


def end_tokenizer(end: int):
    """A tokenizer that knows the end of text and nothing else: prompts are ids already, responses are never decoded."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    text = "<|endoftext|>"
    words = Tokenizer(WordLevel({text: end}, unk_token=text))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=text, pad_token=text, padding_side="left")


def prompt_dataset(work: Work, iterations: int):
    """Random prompts for that many iterations."""
    from datasets import Dataset

    ids = random_ids(work.batch * iterations, work.prompt, work.sizes["vocab_size"]).tolist()
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * work.prompt] * len(ids)})


def end_of_iteration(clock: list[float], types):
    """A callback that notes the time after each iteration, and leaves the context `types` after the first."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            if len(clock) == 1:
                types.__exit__(None, None, None)
            clock.append(time.perf_counter())

    return Clock()


PEERS = {
    "transformers": transformers_sampling,
    **dict.fromkeys(("transformers_eager", "transformers_compiled", "nanogpt_compiled"), sft),
    **dict.fromkeys(("trl", "trl_critic"), trl_ppo),
}


def measure(work: Work) -> dict[str, Any]:
    """Measure the work's peer, or say why that cannot be done."""
    missing = absence(work.peer)
    if missing:
        return {"missing": missing}
    import torch

    result = PEERS[work.peer](work)
    if work.tuned and result["types"] != ["bfloat16"]:
        raise RuntimeError(f"the tuned peer's matrix products ran in {' and '.join(result['types'])}")
    versions = {package: metadata.version(package) for package in PACKAGES[work.peer]}
    return result | {"threads": torch.get_num_threads(), "versions": versions}


if __name__ == "__main__":
    run_child(measure)
