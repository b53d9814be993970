"""How a stage begins: the models it needs, from what earlier stages saved or from its own checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config.configs import PPOConfig, RMConfig, RunConfig, SFTConfig
from config.model_configs import HUB_NAMES, PRESETS, ModelConfig, get_configs
from config.user_error import UserError
from models.families import load_checkpoint, load_pretrained, new_model
from models.lora import freeze_weights, round_frozen, share_base
from models.weights.checkpoint import describe
from models.weights.huggingface import Pretrained, describe_pretrained
from models.weights.pretrained import our_checkpoint
from training.storage.resuming import Resumption
from utils.chat_templates import AUTO, PLAIN, choose_template
from utils.template import PromptTemplate
from utils.tokenizer import Tokenizer, get_tokenizer, load_tokenizer, tokenizer_note


def describe_model(stage: str, tokenizer: Tokenizer, template: PromptTemplate, trained_from: str) -> dict[str, Any]:
    """Entries of model.json that make a checkpoint self-contained."""
    made_with = {"tokenizer": tokenizer.identity(), "template": template.to_dict()}
    return {"stage": stage, **made_with, "trained_from": trained_from}


def template_of(folder: Path) -> PromptTemplate:
    """The prompt template a checkpoint was trained with; UserError where it does not tell."""
    template = describe(folder).get("template")
    if template is None:
        raise UserError(
            f"{folder}: model.json names no prompt template; give a checkpoint that one of the stages wrote"
        )
    try:
        return PromptTemplate.from_dict(template)
    except ValueError as error:
        raise UserError(f"{folder}: model.json: {error}; give a checkpoint that one of the stages wrote") from None


def freeze_method(config: SFTConfig | RMConfig | PPOConfig, model: ModelConfig) -> str:
    """--freeze with auto resolved: lora for a model with adapters and none otherwise."""
    return config.freeze if config.freeze != "auto" else "lora" if model.lora_rank else "none"


def freeze(model: nn.Module, config: SFTConfig | RMConfig | PPOConfig, dtype: torch.dtype) -> nn.Module:
    """Apply --freeze and round what it froze to `dtype`.

    Sets --activation-checkpointing, too: a resumed run may have saved its model with another choice.
    """
    freeze_weights(model, freeze_method(config, model.config))
    round_frozen(model, dtype)
    model.set_options(replace(model.config, activation_checkpointing=config.activation_checkpointing))
    return model


def frozen(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model that does not train: eval mode, no gradients, its matrices in `dtype`."""
    round_frozen(model.requires_grad_(False), dtype)
    return model.eval()


def sft_start(config: SFTConfig, resumption: Resumption | None) -> tuple[nn.Module, Tokenizer, PromptTemplate, str]:
    """Model, tokenizer, template and a word on where the weights come from."""
    preset = get_configs(config.config)
    if resumption is not None:
        folder = resumption.checkpoint
        return load_checkpoint(folder, config=preset), load_tokenizer(folder), template_of(folder), str(folder)
    if config.pretrain == "scratch":
        own = "demo" if preset.stem.endswith("-nano") else "gpt2"
        tokenizer = get_tokenizer(own if config.tokenizer == "auto" else config.tokenizer)
        sizes = replace(preset, vocab_size=tokenizer.vocab_size, embedding_rows=tokenizer.vocab_size)
        template, tokenizer = choose_template(PLAIN if config.template == AUTO else config.template, tokenizer)
        return new_model(sizes), tokenizer, template, "scratch"
    folder = our_checkpoint(config.pretrain, config.runs_dir, "-p") if config.pretrain != "huggingface" else None
    if folder is not None:
        model = load_checkpoint(folder, config=preset, adapters="fresh")
        tokenizer, template = load_tokenizer(folder), template_of(folder)
        if config.template != AUTO:
            template, tokenizer = choose_template(config.template, tokenizer)
        return model, tokenizer, template, str(folder)
    found = describe_pretrained(hub_source(config))
    check_family(found, preset)
    tokenizer, note = pretrained_tokenizer(config, found)
    template, tokenizer = choose_template(config.template, tokenizer)
    for line in filter(None, (found.note, note, template.note)):
        print(line)
    return load_pretrained(found.name, preset, tokenizer.vocab_size), tokenizer, template, found.name


def check_family(found: Pretrained, preset: ModelConfig) -> None:
    """Refuse a model whose family is not the preset's: adapters and recipe are made for that."""
    sizes = found.sizes()
    if sizes.family == preset.family:
        return
    fitting = [get_configs(name) for name in PRESETS if "/" not in name and get_configs(name).family == sizes.family]
    best = min(fitting, key=lambda p: (abs(p.n_layer - sizes.n_layer) + abs(p.n_embd - sizes.n_embd), p.name))
    raise UserError(
        f"-p {found.name}: holds {found.form.what}, and --config {preset.name} is of another family; "
        f"give --config {best.name} or {best.name}/lora"
    )


def hub_source(config: SFTConfig) -> str:
    """The folder or hub name that -p means."""
    return HUB_NAMES[get_configs(config.config).stem] if config.pretrain == "huggingface" else config.pretrain


def pretrained_tokenizer(config: SFTConfig, found: Pretrained) -> tuple[Tokenizer, str]:
    """The tokenizer of --tokenizer, or with auto the model's own; and a line on it, or ""."""
    if config.tokenizer == "auto":
        return found.tokenizer(f"-p {found.name}", ", or name the right one with --tokenizer")
    tokenizer = get_tokenizer(config.tokenizer)
    return tokenizer, tokenizer_note(tokenizer, found.config.vocab_size)


def saved_by(script: str, argument: str, runs_dir: str, flag: str) -> Path:
    """The checkpoint that a later stage starts from, as `find_checkpoint` finds it.

    UserError where there is none, it is of another stage, or a model in Hugging Face's form is given.
    """
    kind, role = {"train_sft.py": ("language", "lm"), "train_rm.py": ("reward", "reward")}[script]
    folder = our_checkpoint(argument, runs_dir, flag)
    if folder is None:
        how = f"; make one with {script} -p {argument}" if kind == "language" else ""
        raise UserError(f"{flag} {argument}: is a model in Hugging Face's form, and a run of {script} is needed{how}")
    if describe(folder)["role"] != role:
        raise UserError(f"{flag} {argument}: holds no {kind} model; give a run of {script}")
    return folder


def rm_start(
    config: RMConfig, resumption: Resumption | None, dtype: torch.dtype
) -> tuple[nn.Module, nn.Module, Tokenizer, PromptTemplate, Path]:
    """Reward model, frozen SFT model, tokenizer, template and the SFT checkpoint; `dtype` is that of the products."""
    options = without_dropout(get_configs(config.config))
    if resumption is not None:
        source = resumption.origins["sft"]
    else:
        source = saved_by("train_sft.py", config.pretrain, config.runs_dir, "-p")
    sft = frozen(load_checkpoint(source, config=replace(options, lora_rank=0)), dtype)
    if resumption is not None:
        model = load_checkpoint(resumption.checkpoint, "reward")
    else:
        model = load_checkpoint(source, "reward", options, adapters="fresh")
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
    that is there at a time. UserError where a checkpoint is missing, of the wrong stage, or of another tokenizer.
    """
    options = without_dropout(get_configs(config.config))
    rm_argument, needs_reward_model = reward_source(config)
    if rm_argument == "none" and needs_reward_model:
        raise UserError("-c none: PPO needs a reward: give a reward model with -c, or --reward-fn FILE.py:FUNCTION")
    if resumption is not None:
        sft, rm = resumption.origins["sft"], resumption.origins["rm"]
    else:
        sft = saved_by("train_sft.py", config.actor, config.runs_dir, "-a")
        rm = None if rm_argument == "none" else saved_by("train_rm.py", rm_argument, config.runs_dir, "-c")
    if rm is not None and load_tokenizer(sft).identity()["sha256"] != load_tokenizer(rm).identity()["sha256"]:
        raise UserError(
            f"-c {config.critic}: its tokenizer is not that of -a {config.actor}; train the reward model from that one"
        )
    if rm is not None and template_of(sft) != template_of(rm):
        raise UserError(
            f"-c {config.critic}: has another prompt template than -a {config.actor}; train the reward model from that "
            "one"
        )
    reference = frozen(load_checkpoint(sft, config=replace(options, lora_rank=0)), dtype)
    reward_model = frozen(load_checkpoint(rm, "reward"), dtype) if rm and needs_reward_model else None
    shared = share_base([reference, reward_model]) if reward_model is not None else 0
    if resumption is not None:
        actor = load_checkpoint(resumption.checkpoint, "actor")
    else:
        actor = load_checkpoint(sft, "actor", options, adapters="fresh")
    shared += share_base([reference, freeze(actor, config, dtype)])
    if resumption is not None:
        critic = load_checkpoint(resumption.checkpoint / "critic", "critic")
    else:
        critic = load_checkpoint(rm if rm is not None else sft, "critic", options, adapters="keep")
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

    The reward model's head would read states that it was not trained on: its own adapter made them. UserError where the
    actor has no adapter, so that the value loss would train all of the policy's weights.
    """
    if not actor.config.lora_rank:
        raise UserError("--share-adapter: the model has no adapters; give a --config that ends in /lora")
    critic.take_trunk(actor.trunk)
    if fresh:
        torch.nn.init.zeros_(critic.head.weight)
        torch.nn.init.zeros_(critic.head.bias)
        critic.set_normalisation(1.0, 0.0)


def without_dropout(config: ModelConfig) -> ModelConfig:
    """The same model without dropout: reward model and PPO run without it in every mode."""
    return replace(config, dropout=0.0, lora_dropout=0.0)


def row_limit(config: RunConfig, model: nn.Module) -> int:
    """Longest row in tokens: --max-length (UserError where it is longer than the context), or the context."""
    context = model.config.block_size
    if config.max_length > context:
        raise UserError(f"--max-length {config.max_length}: the model's context is {context}; give at most that")
    return config.max_length or context


def prompt_limit(config: RMConfig | PPOConfig, model: nn.Module) -> int:
    """Longest prompt in tokens that leaves room for a response: what the row limit allows, or --prompt-length;
    UserError where the two do not fit."""
    limit = row_limit(config, model)
    wanted = config.prompt_length if isinstance(config, PPOConfig) else 0
    prompt = wanted or limit - config.response_length
    if prompt < 1 or prompt + config.response_length > limit:
        prompts = f"prompts of {wanted}" if wanted else "a prompt"
        raise UserError(
            f"--response-length {config.response_length}: responses and {prompts} do not fit into {limit} tokens a row"
        )
    return prompt
