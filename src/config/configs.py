"""Every setting of a run: one frozen, validated dataclass per training stage. Models are in `config/model_configs.py`.

`config/command_line.py` turns a stage's dataclass into its command line; the defaults depend on the preset named by
`--config`, because a 0.75 M-parameter model and a 355 M one want different recipes. Where a default comes from a paper
or another code base, the recipe table below says so.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, TypeVar

from tyro.conf import arg

from config.model_configs import ModelConfig, get_configs
from config.user_error import UserError

# What settings may be, in every stage that has them: the least whole number, then ranges of numbers.
_LEAST = dict.fromkeys(
    (
        "max_steps", "max_length", "seed", "tokens_per_micro_batch", "warmup_steps", "critic_warmup",
        "warmup_iterations", "prompt_length",
    ), 0
) | dict.fromkeys(
    (
        "batch_size", "global_batch_size", "eval_every", "save_every", "log_every", "eval_examples", "keep", "epochs",
        "sample_tokens", "iterations", "ppo_epochs", "minibatches", "response_length", "kl_horizon",
    ), 1
) | {"normalise_prompts": 8}  # fmt: skip
_POSITIVE = ("lr", "max_grad_norm", "adam_eps", "critic_lr", "temperature", "clip_eps")
_NOT_NEGATIVE = (
    "plan_gb", "weight_decay", "kl_coef", "kl_target", "value_clip_eps", "vf_coef", "missing_eos_penalty", "kl_stop",
    "max_kl",
)  # fmt: skip
_SHARES = ("min_lr_ratio", "gamma", "lam")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What all three stages have in common."""

    name: Annotated[str, arg(aliases=["-n"])] = "demo"
    """Experiment name; the run's folder is runs/STAGE_NAME_TIME."""
    config: str = "gpt2-nano"
    """Model preset: gpt2, gpt2-medium, gpt2-large, gpt2-xl, gpt2-nano (plain or with /dropout or /lora), smollm2-135m,
    smollm2-360m, smollm2-1.7b, tinyllama-1.1b, llama-3.2-1b (plain or with /lora). With a pre-trained model the sizes
    are the model's; the preset gives dropout, adapters and the recipe."""
    dataset: str = "demo"
    """hh, rm-static, sft-static, hh-sft, demo, demo-text, hub:OWNER/NAME, or the path of a file: .jsonl, .json, .csv,
    .tsv, .parquet, or .txt with a prompt a line."""
    strategy: Annotated[Literal["naive"], arg(aliases=["-s"])] = "naive"
    """How the work is spread over devices: naive is one device."""
    batch_size: Annotated[int, arg(aliases=["-b"])] = 8
    """Rows (SFT, PPO) or prompts (RM) in one forward and backward pass, at most --global-batch-size: the knob for
    memory. Results depend on it by rounding only, unless there is dropout, whose masks are drawn pass by pass. Given
    alone, it switches a preset's --tokens-per-micro-batch off."""
    tokens_per_micro_batch: int | Literal["auto"] = 0
    """Bound a pass by its tokens, padding included (rows x longest), in place of --batch-size; a longer row has a pass
    of its own. auto: as many as fit, by the plan, with a tenth of the memory to spare. 0: off."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: far less memory for about a third more time; same results."""
    compile: bool = False
    """Run the blocks of what trains through torch.compile; where that fails, a line says so and the run goes on. It
    takes a minute at the start. On a CPU it gained nothing; on a GPU it was not measured."""
    global_batch_size: int = 32
    """Rows (SFT, PPO) or prompts (RM) behind one optimizer step; micro-batches of -b rows are accumulated to it."""
    lr: float = 1e-5
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    adam_eps: float = 1e-8
    """Epsilon of AdamW; the larger it is, the smaller the steps of parameters with small gradients."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down."""
    max_steps: int = 0
    """Stop after this many optimizer steps (PPO: iterations); 0: as many as the epochs (PPO: --iterations) give."""
    eval_every: int = 100
    """Steps (PPO: iterations) between held-out evaluations."""
    eval_examples: int = 256
    """Held-out examples per evaluation."""
    save_every: int = 500
    """Steps (PPO: iterations) between checkpoints."""
    keep: int = 2
    """How many of the newest step checkpoints to keep (best/ and final/ come on top); in PPO those that main.py -t
    overoptimisation can grade later."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """What a checkpoint that cannot be written (full disk) does: stop the run, or let it go on without it."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl and TensorBoard (PPO logs every iteration)."""
    max_length: int = 0
    """Longest row in tokens, prompt and response together; 0: the model's context."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss, gradient, reward or log-probability that is not finite does: stop the run, or skip the batch
    without a step and count it. The rows are written to the run's folder either way."""
    skip_bad_rows: bool = False
    """Count and report malformed rows instead of stopping at the first."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes CUDA, then MPS, then the CPU."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Matrix precision; weights and optimizer stay fp32. auto: bf16 where the GPU has it, fp16 with loss scaling on
    older ones, fp32 on the CPU."""
    seed: int = 0
    """Seed of initialisation, data order, dropout and sampling."""
    runs_dir: str = "runs"
    """Where run folders are made and looked for."""
    resume: str = ""
    """auto: go on with the newest run of this name, or end at once if it is finished; PATH: with that run (its folder
    or name) or checkpoint. Settings that are not given are the run's own; those that are given must agree with them."""
    resume_override: str = ""
    """Settings that may differ from the run's when it is gone on with, by commas: max_steps, lr, eval_every, ..."""
    deterministic: bool = False
    """Choose kernels that give the same bits again on this machine, and tell what that costs."""
    plan: bool = False
    """Print what will be in memory, item by item, and stop: nothing is loaded, no run folder is made."""
    plan_gb: float = 0.0
    """--plan for a GPU of so many GB (1e9 bytes) that need not be there; with --device cpu for such a machine."""

    def __post_init__(self) -> None:
        get_configs(self.config)
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise UserError(f"--name {self.name!r}: use letters, digits, dots, - and _, no spaces or slashes")
        for field, value in asdict(self).items():
            wanted = ""
            if field in _LEAST and value != "auto" and not value >= _LEAST[field]:
                wanted = f"{_LEAST[field]} or more"
            elif field in _POSITIVE and not 0 < value < math.inf:
                wanted = "a positive number"
            elif field in _NOT_NEGATIVE and not 0 <= value < math.inf:
                wanted = "0 or a positive number"
            elif field in _SHARES and not 0 <= value <= 1:
                wanted = "in [0, 1]"
            if wanted:
                raise UserError(f"{flag_of(field)} {value}: must be {wanted}")
        if self.seed >= 2**31:  # numpy takes 32 bits, and every rank adds its own offset
            raise UserError(f"--seed {self.seed}: must be below {2**31}")
        if self.plan_gb:
            object.__setattr__(self, "plan", True)


@dataclass(frozen=True, kw_only=True)
class SFTConfig(RunConfig):
    """Supervised fine-tuning: next-token loss on the response tokens and EOS (the choices: docs/details.md)."""

    pretrain: Annotated[str, arg(aliases=["-p"])] = "scratch"
    """Start from: scratch (random, with the demo's vocabulary for gpt2-nano), huggingface (the hub model of the
    preset's name), a Hugging Face name or folder, or one of our runs or checkpoints."""
    tokenizer: str = "auto"
    """auto, gpt2, demo, or a folder or hub name with a Hugging Face tokenizer. auto: the pre-trained model's own."""
    template: Literal["auto", "own", "human-assistant", "chatml", "llama3", "zephyr"] = "auto"
    """How dialogues are written for the model: as text (human-assistant), or with special tokens that its tokenizer
    has. own: as its own chat template says. auto: that for a chat model in Hugging Face's form, that of the checkpoint
    for a run of ours, human-assistant else. Later stages keep it."""
    freeze: Literal["auto", "none", "lora", "last_block"] = "auto"
    """What stays fixed: auto is lora for a LoRA preset and none otherwise."""
    epochs: int = 1
    """Passes over the data."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    min_lr_ratio: float = 0.1
    """The cosine schedule ends at this share of the peak."""
    beta2: float = 0.95
    """Second-moment decay of AdamW."""
    sample_tokens: int = 64
    """Tokens per sample drawn at evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta2 < 1:
            raise UserError(f"--beta2 {self.beta2}: must be in (0, 1)")


@dataclass(frozen=True, kw_only=True)
class RMConfig(RunConfig):
    """Reward model: ranked completions of one prompt, one score each, one epoch (InstructGPT eq. 1)."""

    pretrain: Annotated[str, arg(aliases=["-p"])] = "sft_demo"
    """The SFT run or checkpoint that the trunk starts from."""
    adam_eps: float = 1e-5
    """Epsilon of AdamW; 1e-5 as in Ziegler et al. 2019 keeps parameters with tiny gradients from taking full steps."""
    freeze: Literal["auto", "none", "lora", "last_block"] = "auto"
    """What stays fixed beside the head: auto is lora for a LoRA preset and none otherwise."""
    epochs: int = 1
    """Passes over the data; a second one overfits (InstructGPT, section 3.5)."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    min_lr_ratio: float = 0.0
    """The cosine schedule ends at this share of the peak."""
    normalise_prompts: int = 256
    """Training prompts whose SFT samples set the reward's mean to 0 and deviation to 1."""
    temperature: float = 0.0
    """Sampling temperature of those samples; 0 takes PPO's default for the preset. It must be the one PPO samples
    at."""
    response_length: int = 0
    """Longest sampled response in tokens; 0 takes PPO's default for the preset."""

    def __post_init__(self) -> None:
        ppo = stage_defaults(PPOConfig, self.config)
        for field in ("temperature", "response_length"):
            if getattr(self, field) == 0:
                object.__setattr__(self, field, getattr(ppo, field))
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class PPOConfig(RunConfig):
    """PPO with a KL-penalised reward (Ziegler et al. 2019; Stiennon et al. 2020). --global-batch-size is the rollout
    batch."""

    actor: Annotated[str, arg(aliases=["-a"])] = "sft_demo"
    """The SFT run or checkpoint: start of the policy and the frozen reference."""
    critic: Annotated[str, arg(aliases=["-c"])] = "auto"
    """The reward-model run or checkpoint: the frozen reward and the start of the critic. auto: rm_demo, or, when
    --reward-fn takes the reward model's place, none: the critic then starts from the SFT model with a head of zeros."""
    reward_fn: str = ""
    """FILE.py:FUNCTION, a reward (prompts, responses) -> floats, in place of the reward model or added to it
    (--reward-fn-weight)."""
    reward_fn_weight: float = 0.0
    """0: --reward-fn replaces the reward model; otherwise reward = model score + weight x function."""
    eval_reward_fn: str = ""
    """FILE.py:FUNCTION, reported at evaluations as eval/gold and never trained on; what main.py -t overoptimisation
    draws before the first checkpoint that was kept."""
    adam_eps: float = 1e-5
    """Epsilon of AdamW; 1e-5 as in Ziegler et al. 2019 keeps parameters with tiny gradients from taking full steps."""
    freeze: Literal["auto", "none", "lora", "last_block"] = "auto"
    """What stays fixed beside the value head: auto is lora for a LoRA preset and none otherwise."""
    iterations: int = 200
    """Rollout-and-update rounds."""
    ppo_epochs: int = 4
    """Passes over each rollout batch."""
    minibatches: int = 1
    """Optimizer steps per pass."""
    critic_lr: float = 1e-5
    """Peak learning rate of the critic; --lr is the actor's."""
    response_length: int = 64
    """Longest response in tokens."""
    prompt_length: int = 0
    """Longest prompt in tokens, cut from the left; 0: what the context leaves beside the response."""
    temperature: float = 0.7
    """Sampling temperature; every log-probability is taken at it."""
    kl_coef: float = 0.05
    """beta: weight of the per-token KL penalty in the reward."""
    kl_target: float = 0.0
    """Aim for this many nats per response with an adaptive beta (Ziegler et al. 2019, section 2.2); 0: beta is
    fixed."""
    kl_horizon: int = 10000
    """Episodes over which the adaptive beta reacts."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE lambda."""
    clip_eps: float = 0.2
    """Policy ratio clip."""
    value_clip_eps: float = 0.2
    """Value clip, in units of the normalised reward; 0: no value clip."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    missing_eos_penalty: float = 1.0
    """Subtracted from the score of a response that never ended."""
    kl_stop: float = 0.0
    """Skip the rest of an update when approxkl passes 1.5 times this; 0: never."""
    max_kl: float = 0.0
    """Stop the run before the update when an iteration's KL to the reference is above this many nats per response; 0:
    never."""
    whiten_rewards: bool = False
    """Scale rewards to unit variance; off because the reward model is normalised already."""
    share_adapter: bool = False
    """With a LoRA preset: actor and critic are one trunk pass through one adapter, and the critic is a head on it that
    starts from zero (J-Hydra, Santacroce et al. 2023). Less time and memory; the value loss then moves the policy, so
    --vf-coef matters."""
    critic_warmup: int = 0
    """Iterations in which only the critic learns."""
    warmup_iterations: int = 0
    """Iterations over which both learning rates rise linearly before they fall to 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minibatches > self.global_batch_size:
            raise UserError(
                f"--minibatches {self.minibatches}: at most one per rollout row "
                f"(--global-batch-size {self.global_batch_size})"
            )
        if self.kl_target and not self.kl_coef:
            raise UserError("--kl-target: an adaptive coefficient needs a start above 0; set --kl-coef")
        if not math.isfinite(self.reward_fn_weight):
            raise UserError(f"--reward-fn-weight {self.reward_fn_weight}: must be a finite number")
        if self.reward_fn_weight and not self.reward_fn:
            raise UserError("--reward-fn-weight: needs --reward-fn FILE.py:FUNCTION")


# Tokens of a pass by size: what a GPU of 16 GB holds in every stage that it holds at all (docs/memory.md). Results do
# not depend on it.
_TOKENS_PER_PASS = {
    "gpt2": 8192, "gpt2-medium": 4096, "gpt2-large": 2048, "gpt2-xl": 1024,
    "smollm2-135m": 4096, "smollm2-360m": 2048, "smollm2-1.7b": 1024, "tinyllama-1.1b": 2048, "llama-3.2-1b": 2048,
}  # fmt: skip

StageConfig = TypeVar("StageConfig", SFTConfig, RMConfig, PPOConfig)

# Recipes. GPT-2 sizes: SFT with a peak of 2e-5..1e-4 and a cosine to 10 % (OpenRLHF); reward model one epoch at
# 1e-5..5e-5 on 32-64 prompts (Ziegler et al. 2019: 5e-5); PPO in full with actor 3e-6 (TRL) and critic 1e-5 (OpenRLHF:
# 9e-6), with LoRA 1e-4..3e-4. gpt2-nano: tuned on the offline demo.
_RECIPES: dict[str, dict[type, dict[str, Any]]] = {
    "gpt2": {
        SFTConfig: dict(
            dataset="hh-sft", pretrain="huggingface", batch_size=8, global_batch_size=32, lr=5e-5, eval_every=200,
        ),
        RMConfig: dict(
            dataset="rm-static", batch_size=8, global_batch_size=32, lr=2e-5, eval_every=200,
        ),
        PPOConfig: dict(
            dataset="rm-static", batch_size=8, global_batch_size=128, lr=3e-6, critic_lr=1e-5,
            eval_every=10, save_every=20,
        ),
    },
    "gpt2-nano": {
        SFTConfig: dict(batch_size=16, global_batch_size=64, lr=3e-3, epochs=3, eval_every=150, warmup_steps=30),
        RMConfig: dict(batch_size=16, global_batch_size=32, lr=7e-4, eval_every=250, eval_examples=1000),
        PPOConfig: dict(
            batch_size=32, global_batch_size=128, lr=3e-4, critic_lr=5e-4, iterations=40, temperature=1.0, kl_coef=0.08,
            response_length=64, eval_every=10, save_every=10,
        ),
    },
}  # fmt: skip
_LORA_RECIPES: dict[str, dict[type, dict[str, Any]]] = {
    "gpt2": {SFTConfig: dict(lr=2e-4), RMConfig: dict(lr=2e-4), PPOConfig: dict(lr=1e-4, critic_lr=2e-4)},
    "gpt2-nano": {SFTConfig: dict(lr=5e-3), RMConfig: dict(lr=3e-3), PPOConfig: dict(lr=1e-3, critic_lr=1e-3)},
}


def stage_defaults(stage: type[StageConfig], preset: str) -> StageConfig:
    """The default configuration of a stage for a model preset; UserError for one that is unknown."""
    model = get_configs(preset)
    # A LLaMA's context of thousands of tokens is longer than the dialogues here; rows that long would not fit a card.
    row = {"max_length": 1024} if model.block_size > 1024 else {}
    recipe = "gpt2-nano" if model.stem.endswith("-nano") else "gpt2"
    values = {"tokens_per_micro_batch": _TOKENS_PER_PASS.get(model.stem, 0), **row, **_RECIPES[recipe][stage]}
    if model.lora_rank:
        values |= _LORA_RECIPES[recipe][stage]
    return stage(config=preset, **values)


def resolved(config: RunConfig | ModelConfig) -> dict[str, Any]:
    """The configuration as plain JSON values, for hyperparams.json and checkpoints."""
    return asdict(config)


def flag_of(field: str) -> str:
    """The command-line flag of a configuration field."""
    return "--" + field.replace("_", "-")
