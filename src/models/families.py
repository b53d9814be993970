"""The model families, and the one door to a model of whichever it is."""

from __future__ import annotations

from pathlib import Path

from config.model_configs import ModelConfig
from models.causal_lm import CausalLM
from models.gpt import GPT, GPTActor, GPTCritic, GPTRewardModel
from models.llama import Llama, LlamaActor, LlamaCritic, LlamaRewardModel
from models.weights.checkpoint import saved_config
from models.weights.huggingface import describe_pretrained, load_described

FAMILIES: dict[str, dict[str, type[CausalLM]]] = {
    "gpt2": {"lm": GPT, "actor": GPTActor, "critic": GPTCritic, "reward": GPTRewardModel},
    "llama": {"lm": Llama, "actor": LlamaActor, "critic": LlamaCritic, "reward": LlamaRewardModel},
}
"""The classes of each family by role."""


def new_model(config: ModelConfig, role: str = "lm") -> CausalLM:
    """A model with random weights."""
    return FAMILIES[config.family][role](config)


def load_checkpoint(
    folder: str | Path, role: str = "lm", config: ModelConfig | None = None, adapters: str = "keep"
) -> CausalLM:
    """One of our checkpoint folders in a role: "lm", "actor", "critic" or "reward".

    `models.weights.checkpoint.load_model` says what `config` and `adapters` do, and when it raises a UserError.
    """
    return FAMILIES[saved_config(Path(folder)).family][role].from_checkpoint(folder, config, adapters)


def load_pretrained(
    name_or_path: str, config: ModelConfig | None = None, vocab_size: int | None = None
) -> CausalLM:
    """A language model in Hugging Face's form, of the family that its config.json names.

    `models.weights.huggingface.load_pretrained` says what `config` and `vocab_size` do, and when it raises a UserError.
    """
    found = describe_pretrained(name_or_path)
    return load_described(FAMILIES[found.form.family]["lm"], found, config, vocab_size)
