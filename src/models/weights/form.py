"""What the reading and writing of Hugging Face's form (`models.weights.huggingface`) has to know of a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor

from config.model_configs import ModelConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class HuggingFaceForm(ABC):
    """How a family looks in Hugging Face's form.

    family: in our configs. model_type: in config.json. what: in messages.
    classes: transformers' classes of a language model and of a reward model; bare: that of the trunk.
    trunk: start of the names of all tensors but those of heads. table: name of the token table.
    output: name of the output projection in our state, "" where the token table is that by construction.
    needed: entries of config.json that say what the model computes, and no more than that.
    projections: pattern of the names of projections, which adapters are for.
    old_buffers: ends of names that old files have and nothing reads.
    """

    family: str
    model_type: str
    what: str
    trunk: str
    classes: dict[str, str]
    bare: str
    table: str
    output: str
    needed: tuple[str, ...]
    projections: str
    old_buffers: tuple[str, ...] = ()

    @abstractmethod
    def check(self, config: PretrainedConfig) -> str:
        """What config.json asks for that our model does not compute, and what to take instead; "" where nothing."""

    @abstractmethod
    def least_numbers(self, config: PretrainedConfig) -> int:
        """Numbers in the weights of such a model, at least."""

    @abstractmethod
    def sizes(self, config: PretrainedConfig, name: str, vocab_size: int) -> ModelConfig:
        """Our config for a config.json and a tokenizer of so many ids."""

    @abstractmethod
    def description(self, config: ModelConfig) -> dict[str, Any]:
        """config.json of a language model of ours, sizes alone."""

    @abstractmethod
    def ours(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our state from transformers', which has all tensors of a language model."""

    @abstractmethod
    def theirs(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The reverse of `ours`."""

    @abstractmethod
    def fold_head(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        """A reward model's state in transformers' names, its scalar head gain * (w . h + b) + bias made to a product
        alone, as transformers has it; and the constant that is left out of the scores by that."""

    def empty_size(self, config: PretrainedConfig) -> str:
        """The first size of config.json that is below 1, or ""."""
        sizes = (size for size in self.needed if isinstance(getattr(config, size, None), int))
        return next((s for s in sizes if not isinstance(getattr(config, s), bool) and getattr(config, s) < 1), "")

    def plain(self, config: PretrainedConfig) -> PretrainedConfig:
        """config.json without its other entries, which could name kernels or quantisers: code."""
        return type(config)(**{entry: getattr(config, entry) for entry in self.needed})

    def language_model(self) -> type[PreTrainedModel]:
        """transformers' class of the language model."""
        import transformers  # seconds; only here

        return getattr(transformers, self.classes["lm"])


def split_head(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, float]:
    """A reward model's tensors without those of its head; the head's product [d] and constant, in fp64."""
    head = {key: value.double() for key, value in state.items() if key.startswith("head.")}
    score = head["head.norm_gain"] * head["head.weight"][0]
    constant = head["head.norm_gain"] * head["head.bias"][0] + head["head.norm_bias"]
    return {key: value for key, value in state.items() if not key.startswith("head.")}, score, float(constant)
