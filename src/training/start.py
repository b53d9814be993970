"""How a stage begins: a run folder, new or to go on with, and the models it needs from what earlier stages saved."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config.configs import GPTConfig, PPOConfig, RMConfig, RunConfig, SFTConfig, get_configs, resolved
from config.scrub import scrubbed
from config.user_error import UserError
from models.checkpoint import describe
from models.gpt import GPT, GPTActor, GPTCritic, GPTRewardModel
from models.lora import freeze_weights, round_frozen, share_base
from models.manifest import fault_of
from training.runtime import Runtime
from training.saving import STATE, load_state, newest_whole
from utils.durable import Disk, set_aside, standing, sweep, write_file
from utils.run_folder import (
    HYPERPARAMS,
    create_run,
    find_checkpoint,
    lock_run,
    places,
    runs_named,
    step_checkpoints,
    versions,
    write_hyperparams,
)
from utils.template import PromptTemplate
from utils.tokenizer import Tokenizer, get_tokenizer, load_tokenizer

# Settings that may differ between a run and its resumption: where it runs, what it keeps, not what it computes.
_MAY_CHANGE = (
    "resume", "resume_override", "runs_dir", "device", "keep", "save_every", "on_save_error", "batch_size",
    "tokens_per_micro_batch", "activation_checkpointing", "plan", "plan_gb",
)  # fmt: skip

# Settings that --resume-override lets differ: how long, how fast and how closely watched. All others decide what the
# numbers of a checkpoint mean (its data, its model, its objective): with another one it is another run.
OVERRIDABLE = (
    "max_steps", "epochs", "iterations", "lr", "critic_lr", "min_lr_ratio", "weight_decay", "max_grad_norm", "max_kl",
    "on_nonfinite", "eval_every", "eval_examples", "log_every", "deterministic",
)  # fmt: skip


@dataclass(frozen=True)
class Resumption:
    """A run to go on with: its folder, the checkpoint, the trainer's state, hyperparams.json, and the settings that now
    differ: {field: [then, now]}."""

    run: Path
    checkpoint: Path
    state: dict[str, Any]
    hyperparams: dict[str, Any]
    overridden: dict[str, list[Any]]


def find_resumption(stage: str, config: RunConfig) -> Resumption | None:
    """What --resume means: None without the flag, or for `auto` when no unfinished run of this name has a checkpoint.

    The run is locked; nothing in it is changed yet.

    Raises:
        UserError: no such run, nothing whole to go on from, another process at work on it, or settings that differ from
            the run's.
    """
    wanted = _override_fields(config)
    if not config.resume:
        return None
    if config.resume == "auto":
        run = next((r for r in runs_named(f"{stage}_{config.name}", config.runs_dir) if _unfinished(r)), None)
        if run is None:
            print(f"--resume auto: no unfinished run {stage}_{config.name} with a checkpoint; starting a new one")
            return None
        checkpoint = None
    else:
        run, checkpoint = _run_and_checkpoint(config)
    lock_run(run)
    checkpoint = _whole_checkpoint(run, checkpoint, config)
    try:
        hyperparams = json.loads((run / HYPERPARAMS).read_text())
        old = dict(hyperparams["config"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--resume {config.resume}: {HYPERPARAMS} of {run} is no record of a run ({error}); start a new one"
        ) from None
    if hyperparams.get("stage") != stage:
        raise UserError(
            f"--resume {config.resume}: is a run of stage {hyperparams.get('stage')}, not {stage}; use its own script"
        )
    changed = _differences(scrubbed(old), scrubbed(json.loads(json.dumps(resolved(config)))))
    refused = [f"{field}: {then!r} -> {now!r}" for field, (then, now) in changed.items() if field not in wanted]
    if refused:
        raise UserError(
            f"--resume {run}: settings differ from the run's ({'; '.join(refused)}); repeat the run's own flags, or "
            f"allow the change with --resume-override where that makes sense ({', '.join(OVERRIDABLE)})"
        )
    state = load_state(checkpoint)
    print(f"going on with {checkpoint}" + "".join(f"; {k}: {a!r} -> {b!r}" for k, (a, b) in changed.items()))
    return Resumption(run, checkpoint, state, hyperparams, changed)


def _override_fields(config: RunConfig) -> set[str]:
    """The fields that --resume-override names.

    Raises:
        UserError: one that may not change.
    """
    wanted = {name.strip().removeprefix("--").replace("-", "_") for name in config.resume_override.split(",")} - {""}
    unknown = sorted(wanted - set(OVERRIDABLE))
    if unknown:
        raise UserError(f"--resume-override {', '.join(unknown)}: may not change; these may: {', '.join(OVERRIDABLE)}")
    if wanted and not config.resume:
        raise UserError(f"--resume-override {config.resume_override}: needs --resume auto or --resume PATH")
    return wanted


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    """{field: [then, now]} of the settings that decide what a run computes."""
    fields = [field for field in {**new, **old} if field not in _MAY_CHANGE]
    return {field: [old.get(field), new.get(field)] for field in fields if old.get(field) != new.get(field)}


def _unfinished(run: Path) -> bool:
    """Whether a run has step checkpoints, and none of them has become final/."""
    steps, final = step_checkpoints(run), standing(run / "final")
    if not steps or not final.exists():
        return bool(steps)
    return int(steps[-1].name[5:]) > describe(final).get("step", math.inf)  # gone on with after its end


def _run_and_checkpoint(config: RunConfig) -> tuple[Path, Path | None]:
    """What `--resume PATH` means: a run folder, or one and the checkpoint inside it."""
    folder = next((p for p in places(config.resume, config.runs_dir) if p.is_dir()), None)
    around = (folder, *folder.parents[:2]) if folder else ()
    run = next((p for p in around if (p / HYPERPARAMS).is_file()), None)
    if run is None:
        raise UserError(f"--resume {config.resume}: no run folder or checkpoint inside one; give runs/STAGE_NAME_TIME")
    return run, folder if run != folder else None


def _whole_checkpoint(run: Path, wanted: Path | None, config: RunConfig) -> Path:
    """The checkpoint to go on from: the one that was asked for, or the newest whole one of the run.

    Raises:
        UserError: it is not whole, or the run has none.
    """
    if wanted is not None:
        fault = fault_of(wanted)
        if fault is not None and (wanted / STATE).is_file():
            raise UserError(
                f"--resume {config.resume}: is not whole ({fault}); give an earlier checkpoint, or --resume {run}"
            )
        return wanted
    if not step_checkpoints(run):
        raise UserError(f"--resume {config.resume}: has nothing under checkpoints/ to go on from; start a new run")
    checkpoint, faults = newest_whole(run)
    if checkpoint is None:
        torn = "; ".join(faults)
        raise UserError(
            f"--resume {config.resume}: {run} has no whole checkpoint to go on from ({torn}); start a new run"
        )
    for fault in faults:
        print(f"passed over: {fault}", file=sys.stderr)
    return checkpoint


def require_one_process(runtime: Runtime) -> None:
    """Refuse a launcher: every process would train on the same rows and write the same run.

    Raises:
        UserError: there are several processes.
    """
    if runtime.world_size > 1:
        raise UserError("--strategy naive: runs on one device; start the script with python, without a launcher")


def open_run(
    stage: str,
    config: RunConfig,
    model: nn.Module,
    runtime: Runtime,
    resumption: Resumption | None,
    extra: dict[str, Any],
) -> Path:
    """The run's folder, made and described unless it is there already; `extra` says what the run starts from.

    Raises:
        UserError: a run to go on with was training on other data (`extra["data"]`, a fingerprint).
    """
    if resumption is not None:
        if resumption.hyperparams.get("data") != extra["data"]:
            raise UserError(
                f"--resume {resumption.run}: --dataset {config.dataset} gives other rows than when it was started; "
                "put the old data back, or start a new run"
            )
        _compare_machines(config, runtime, resumption)
        _take_up(config, resumption)
        return resumption.run
    run = create_run(stage, config.name, config.runs_dir)
    extra = {"runs_on": runtime.describe(), **extra}
    try:
        write_hyperparams(run, stage, resolved(config), resolved(model.config), extra)
    except OSError as error:
        raise UserError(f"--runs-dir {config.runs_dir}: cannot write there ({error.strerror}); make room") from None
    print(f"writing to {run}")
    return run


def _compare_machines(config: RunConfig, runtime: Runtime, resumption: Resumption) -> None:
    """Tell what is not as it was when the run was started, for then other bits may come out.

    Raises:
        UserError: something is not, and --deterministic promises the same bits.
    """
    now = {"runs_on": runtime.describe(), **versions()}
    then = {"runs_on": resumption.hyperparams.get("runs_on"), **resumption.hyperparams.get("versions", {})}
    changed = "; ".join(f"{key}: {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key])
    if changed and config.deterministic:
        raise UserError(
            f"--deterministic: the run was started elsewhere ({changed}); put that back, or give --no-deterministic "
            "and --resume-override deterministic"
        )
    if changed:
        print(f"note: not as when the run was started ({changed}); it may not end with the same bits")


def _take_up(config: RunConfig, resumption: Resumption) -> None:
    """Make a run ready to be gone on with: what writes left half done goes, and what lies ahead of the checkpoint gives
    way, or the next --resume auto would jump to it."""
    run, disk = resumption.run, Disk()
    for folder in (run, run / "checkpoints"):
        sweep(folder, disk)
    step = resumption.state["step"]
    ahead = [p for p in step_checkpoints(run) if int(p.name[5:]) > step and fault_of(p) is None]
    final = run / "final"
    if final.exists() and describe(final)["step"] > step:
        ahead.append(final)
    for folder in ahead:
        print(f"{folder} is ahead of step {step} and is kept as {set_aside(folder, 'superseded', disk).name}")
    if resumption.overridden:
        record = resumption.hyperparams
        changes = [*record.get("overridden", []), {"step": step, "settings": resumption.overridden}]
        record = {**record, "config": resolved(config), "overridden": changes}
        write_file(run / HYPERPARAMS, (json.dumps(scrubbed(record), indent=2) + "\n").encode())


def describe_model(stage: str, tokenizer: Tokenizer, template: PromptTemplate, trained_from: str) -> dict[str, Any]:
    """Entries of model.json that make a checkpoint self-contained."""
    return {
        "stage": stage,
        "tokenizer": tokenizer.identity(),
        "template": template.to_dict(),
        "trained_from": trained_from,
    }


def template_of(folder: Path) -> PromptTemplate:
    """The prompt template a checkpoint was trained with.

    Raises:
        UserError: the checkpoint does not tell.
    """
    template = describe(folder).get("template")
    if template is None:
        raise UserError(
            f"{folder}: model.json names no prompt template; give a checkpoint that one of the stages wrote"
        )
    try:
        return PromptTemplate.from_dict(template)
    except ValueError as error:
        raise UserError(f"{folder}: model.json: {error}; give a checkpoint that one of the stages wrote") from None


def freeze(model: nn.Module, config: SFTConfig | RMConfig | PPOConfig, dtype: torch.dtype) -> nn.Module:
    """Apply --freeze, auto being lora for a model with adapters and none otherwise; round what it froze to `dtype`.

    Sets --activation-checkpointing, too: a resumed run may have saved its model with another choice.
    """
    method = config.freeze
    if method == "auto":
        method = "lora" if model.config.lora_rank else "none"
    freeze_weights(model, method)
    round_frozen(model, dtype)
    options = replace(model.config, activation_checkpointing=config.activation_checkpointing)
    model.config = model.transformer.config = options
    return model


def frozen(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model that only looks: eval mode, no gradients, its matrices in `dtype`."""
    round_frozen(model.requires_grad_(False), dtype)
    return model.eval()


def sft_start(config: SFTConfig, resumption: Resumption | None) -> tuple[nn.Module, Tokenizer, PromptTemplate, str]:
    """Model, tokenizer, template and a word on where the weights come from."""
    preset = get_configs(config.config)
    if resumption is not None:
        folder = resumption.checkpoint
        return GPT.from_checkpoint(folder, preset), load_tokenizer(folder), template_of(folder), str(folder)
    if config.pretrain == "scratch":
        own = "demo" if preset.family == "gpt2-nano" else "gpt2"
        tokenizer = get_tokenizer(own if config.tokenizer == "auto" else config.tokenizer)
        sizes = replace(preset, vocab_size=tokenizer.vocab_size, embedding_rows=tokenizer.vocab_size)
        return GPT(sizes), tokenizer, PromptTemplate(), "scratch"
    folder = our_checkpoint(config)
    if folder is not None:
        model = GPT.from_checkpoint(folder, preset, adapters="fresh")
        return model, load_tokenizer(folder), template_of(folder), str(folder)
    source = preset.family if config.pretrain == "huggingface" else config.pretrain
    tokenizer = _tokenizer_for(config.tokenizer, Path(source))
    model = GPT.from_pretrained(source, preset, tokenizer.vocab_size)
    return model, tokenizer, PromptTemplate(), source


def our_checkpoint(config: SFTConfig) -> Path | None:
    """The checkpoint of ours that -p means; None when it means a Hugging Face model."""
    source = config.pretrain
    if source == "huggingface" or (Path(source) / "config.json").is_file():
        return None
    try:
        return find_checkpoint(source, config.runs_dir, "-p")
    except UserError:
        # Hub names look like gpt2 or owner/name; anything else was meant to be one of our runs.
        if Path(source).exists() or source.count("/") > 1 or source.startswith((".", "/", "sft_", "runs/")):
            raise
        return None


def _tokenizer_for(wanted: str, folder: Path) -> Tokenizer:
    """auto: the Hugging Face folder's own when it has one, else GPT-2's."""
    if wanted != "auto":
        return get_tokenizer(wanted)
    has_own = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    return get_tokenizer(str(folder) if has_own else "gpt2")


def rm_start(
    config: RMConfig, resumption: Resumption | None, dtype: torch.dtype
) -> tuple[nn.Module, nn.Module, Tokenizer, PromptTemplate, Path]:
    """Reward model, frozen SFT model, tokenizer, template and the SFT checkpoint; `dtype` is that of the products."""
    options = without_dropout(get_configs(config.config))
    if resumption is not None:
        source = Path(resumption.hyperparams["sft"])
    else:
        source = find_checkpoint(config.pretrain, config.runs_dir, "-p")
    sft = frozen(GPT.from_checkpoint(source, replace(options, lora_rank=0)), dtype)
    if resumption is not None:
        model = GPTRewardModel.from_checkpoint(resumption.checkpoint)
    else:
        model = GPTRewardModel.from_checkpoint(source, options, adapters="fresh")
    freeze(model, config, dtype)
    share_base([sft, model])
    return model, sft, load_tokenizer(source), template_of(source), source


@dataclass(frozen=True)
class Roles:
    """The four models of PPO. With LoRA they hold one frozen base."""

    actor: nn.Module
    critic: nn.Module
    reference: nn.Module
    reward_model: nn.Module | None
    sft: Path
    rm: Path | None
    shared_bytes: int


def ppo_start(config: PPOConfig, resumption: Resumption | None, dtype: torch.dtype) -> Roles:
    """Load actor, critic, reference and reward model; what is frozen is held in `dtype`, that of the matrix products.

    Each is frozen and shares the reference's base before the next is loaded, so that two of them in full is the most
    that is there at a time.

    Raises:
        UserError: a checkpoint is missing, of the wrong stage, or the two were made with different tokenizers.
    """
    options = without_dropout(get_configs(config.config))
    rm_argument, needs_reward_model = reward_source(config)
    if rm_argument == "none" and needs_reward_model:
        raise UserError("-c none: PPO needs a reward: give a reward model with -c, or --reward-fn FILE.py:FUNCTION")
    if resumption is not None:
        sft, rm = (Path(resumption.hyperparams[key]) if resumption.hyperparams[key] else None for key in ("sft", "rm"))
    else:
        sft = find_checkpoint(config.actor, config.runs_dir, "-a")
        rm = None if rm_argument == "none" else find_checkpoint(rm_argument, config.runs_dir, "-c")
    if rm is not None and describe(rm)["role"] != "reward":  # a critic may start from a language model, a reward not
        raise UserError(f"-c {rm_argument}: holds no reward model; give a run of train_rm.py")
    if rm is not None and load_tokenizer(sft).identity()["sha256"] != load_tokenizer(rm).identity()["sha256"]:
        raise UserError(
            f"-c {config.critic}: its tokenizer is not that of -a {config.actor}; train the reward model from that one"
        )
    reference = frozen(GPT.from_checkpoint(sft, replace(options, lora_rank=0)), dtype)
    reward_model = frozen(GPTRewardModel.from_checkpoint(rm), dtype) if rm and needs_reward_model else None
    shared = share_base([reference, reward_model]) if reward_model is not None else 0
    if resumption is not None:
        actor = GPTActor.from_checkpoint(resumption.checkpoint)
    else:
        actor = GPTActor.from_checkpoint(sft, options, adapters="fresh")
    shared += share_base([reference, freeze(actor, config, dtype)])
    if resumption is not None:
        critic = GPTCritic.from_checkpoint(resumption.checkpoint / "critic")
    else:
        critic = GPTCritic.from_checkpoint(rm if rm is not None else sft, options, adapters="keep")
        if rm is None:
            torch.nn.init.zeros_(critic.head.weight)
    if not reference.config.same_sizes(critic.config):
        raise UserError(
            f"-c {config.critic}: its sizes are not those of -a {config.actor}; train the reward model from that one"
        )
    if config.share_adapter:
        share_trunk(actor, critic, fresh=resumption is None)
    shared += share_base([reference, freeze(critic, config, dtype)])
    return Roles(actor, critic, reference, reward_model, sft, rm, shared)


def reward_source(config: PPOConfig) -> tuple[str, bool]:
    """What -c means once auto is resolved ("none": no reward model), and whether a reward model is needed."""
    needed = not config.reward_fn or config.reward_fn_weight != 0
    return config.critic if config.critic != "auto" else "rm_demo" if needed else "none", needed


def share_trunk(actor: nn.Module, critic: nn.Module, fresh: bool) -> None:
    """Put the critic's head on the actor's trunk; a fresh one predicts 0 everywhere.

    The reward model's head would read states that it was not trained on: its own adapter made them.

    Raises:
        UserError: the actor has no adapter, so that the value loss would train all of the policy's weights.
    """
    if not actor.config.lora_rank:
        raise UserError("--share-adapter: the model has no adapters; give a --config that ends in /lora")
    critic.transformer, critic.config = actor.transformer, actor.config
    if fresh:
        torch.nn.init.zeros_(critic.head.weight)
        torch.nn.init.zeros_(critic.head.bias)
        critic.set_normalisation(1.0, 0.0)


def without_dropout(config: GPTConfig) -> GPTConfig:
    """The same model without dropout: reward model and PPO run without it in every mode."""
    return replace(config, dropout=0.0, lora_dropout=0.0)


def row_limit(config: RunConfig, model: nn.Module) -> int:
    """Longest row in tokens: --max-length, or the context.

    Raises:
        UserError: --max-length is longer than the context.
    """
    context = model.config.block_size
    if config.max_length > context:
        raise UserError(f"--max-length {config.max_length}: the model's context is {context}; give at most that")
    return config.max_length or context


def prompt_limit(config: RMConfig | PPOConfig, model: nn.Module) -> int:
    """Longest prompt in tokens that leaves room for a response: what the row limit allows, or --prompt-length.

    Raises:
        UserError: prompt and response do not fit.
    """
    limit = row_limit(config, model)
    wanted = config.prompt_length if isinstance(config, PPOConfig) else 0
    prompt = wanted or limit - config.response_length
    if prompt < 1 or prompt + config.response_length > limit:
        prompts = f"prompts of {wanted}" if wanted else "a prompt"
        raise UserError(
            f"--response-length {config.response_length}: responses and {prompts} do not fit into {limit} tokens a row"
        )
    return prompt
