"""Every model of the project: one frozen, validated dataclass per family, and the presets.

`get_configs("gpt2-medium/lora")` gives a preset. What a run does with it stands in `config/configs.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

from config.user_error import UserError

# No model here comes near. A model.json from elsewhere can claim any size, and the module is built before weights are
# compared with it.
_MOST_LAYERS, _LARGEST_SIZE = 1000, 2**24


@dataclass(frozen=True)
class ModelConfig:
    """What models of all families have. With a family's own sizes it is enough to rebuild the module from."""

    family: str = ""
    """Which model it is: a key of `models.families.FAMILIES`."""
    name: str = ""
    """Preset or source the sizes came from."""
    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads per block."""
    n_embd: int = 768
    """Channels of the residual stream."""
    block_size: int = 1024
    """Longest sequence in tokens."""
    vocab_size: int = 50257
    """Columns of the logits: the tokenizer's ids, EOS included, the virtual PAD not."""
    embedding_rows: int = 0
    """Rows of the token table; 0 means vocab_size. A padded table (50304) has more: their logits are never computed."""
    dropout: float = 0.0
    """Embedding, attention and residual dropout (SFT only; reward model and PPO always run with 0)."""
    lora_rank: int = 0
    """Rank of the adapters on the attention and feed-forward projections; 0 trains the weights themselves."""
    lora_alpha: float = 16.0
    """Adapter output is scaled by alpha / rank."""
    lora_dropout: float = 0.0
    """Dropout on the adapters' input."""
    init_std: float = 0.02
    """Standard deviation of random initial weights."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory for about a third more time."""

    # What is chosen for a run, whatever the weights.
    OPTIONS: ClassVar[tuple[str, ...]] = (
        "name", "dropout", "lora_rank", "lora_alpha", "lora_dropout", "activation_checkpointing",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for field in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            value, most = getattr(self, field), _MOST_LAYERS if field == "n_layer" else _LARGEST_SIZE
            if not 1 <= value <= most:
                raise UserError(f"model config: {field} must be 1 to {most}, not {value}")
        if not 0 <= self.lora_rank <= _LARGEST_SIZE:
            raise UserError(f"model config: lora_rank must be 0 (off) or more, not {self.lora_rank}")
        for field in ("dropout", "lora_dropout"):
            if not 0 <= (value := getattr(self, field)) < 1:
                raise UserError(f"model config: {field} must be in [0, 1), not {value}")
        for field in (f.name for f in fields(self) if isinstance(f.default, float) and "dropout" not in f.name):
            if not 0 < (value := getattr(self, field)) < math.inf:
                raise UserError(f"model config: {field} must be a positive number, not {value}")
        if self.embedding_rows == 0:
            object.__setattr__(self, "embedding_rows", self.vocab_size)
        if not self.vocab_size <= self.embedding_rows <= _LARGEST_SIZE:
            raise UserError(
                f"model config: embedding_rows {self.embedding_rows} is not between vocab_size {self.vocab_size} and "
                f"{_LARGEST_SIZE}"
            )

    @property
    def lora_scaling(self) -> float:
        """alpha / rank (LoRA, Hu et al. 2021, section 4.1)."""
        return self.lora_alpha / self.lora_rank if self.lora_rank else 0.0

    @property
    def stem(self) -> str:
        """The preset without its variant: gpt2-medium of gpt2-medium/lora."""
        return self.name.partition("/")[0] if self.name in PRESETS else self.name

    def same_sizes(self, other: ModelConfig) -> bool:
        """Whether weights of one fit the other, adapters aside."""
        return self == replace(other.with_options(self), init_std=self.init_std)

    def with_options(self, preset: ModelConfig) -> Self:
        """These sizes with the name, adapters, dropout and memory options of a preset."""
        return replace(self, **{option: getattr(preset, option) for option in self.OPTIONS})


@dataclass(frozen=True)
class GPTConfig(ModelConfig):
    """Sizes and options of one GPT-2. n_head divides n_embd; block_size is the rows of the position table."""

    family: str = "gpt2"
    name: str = "gpt2"
    layer_norm_eps: float = 1e-5
    """Epsilon of every LayerNorm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_embd % self.n_head:
            raise UserError(f"model config: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.n_embd // self.n_head

    @property
    def n_kv_head(self) -> int:
        """Heads of keys and values: each query has its own."""
        return self.n_head


@dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    """Sizes and options of one LLaMA. dropout is always 0: the family has none."""

    family: str = "llama"
    name: str = "llama"
    n_kv_head: int = 0
    """Heads of keys and values, each for n_head / n_kv_head heads of queries; 0: as many as those."""
    head_dim: int = 0
    """Channels per attention head, an even number; 0: n_embd / n_head."""
    n_inner: int = 0
    """Channels inside the feed-forward network; 0: 8 / 3 n_embd, rounded up to a multiple of 8."""
    tied: bool = True
    """Whether the output projection is the token table."""
    attention_bias: bool = False
    """Biases in the projections to queries, keys and values and behind attention."""
    mlp_bias: bool = False
    """Biases in the feed-forward network."""
    rms_norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotation's wave lengths."""
    rope_type: str = "default"
    """How wave lengths are stretched for long contexts: default (not at all), linear, llama3."""
    rope_factor: float = 1.0
    """By how much (linear: all of them; llama3: the long ones)."""
    rope_low_freq_factor: float = 1.0
    """llama3: waves longer than rope_original_context / this are stretched in full."""
    rope_high_freq_factor: float = 4.0
    """llama3: waves shorter than rope_original_context / this are left as they are."""
    rope_original_context: int = 8192
    """llama3: the context before stretching."""

    def __post_init__(self) -> None:
        super().__post_init__()
        filled = {
            "n_kv_head": self.n_kv_head or self.n_head,
            "head_dim": self.head_dim or self.n_embd // self.n_head,
            "n_inner": self.n_inner or -(-8 * self.n_embd // 24) * 8,
        }
        for field, value in filled.items():
            object.__setattr__(self, field, value)
            if not 1 <= value <= _LARGEST_SIZE:
                raise UserError(f"model config: {field} must be 1 to {_LARGEST_SIZE}, not {value}")
        if self.n_head % self.n_kv_head:
            raise UserError(f"model config: n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.head_dim % 2:
            raise UserError(f"model config: head_dim {self.head_dim} is odd; rotations take channels in pairs")
        if self.dropout:
            raise UserError(f"model config: dropout {self.dropout}: a LLaMA has none; leave it 0")
        if self.rope_type not in ("default", "linear", "llama3"):
            raise UserError(f"model config: rope_type {self.rope_type!r}: there are default, linear and llama3")
        if self.rope_original_context < 1 or self.rope_low_freq_factor >= self.rope_high_freq_factor:
            raise UserError("model config: rope_low_freq_factor must be below rope_high_freq_factor")


# Radford et al. 2019, table 2; head counts as in the released checkpoints (GPT-2 small has 12).
_GPT2: dict[str, dict[str, Any]] = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
    # The offline model. std 0.02 is far too small at 128 channels: the facts of the demo are then learned much later.
    "gpt2-nano": dict(n_layer=3, n_head=4, n_embd=128, block_size=192, vocab_size=1024, init_std=0.06),
}
_SMOLLM2 = dict(vocab_size=49152, block_size=8192, rope_theta=1e5)
# As in the config.json of each model on the hub.
_LLAMA: dict[str, dict[str, Any]] = {
    "smollm2-135m": dict(
        n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_inner=1536, init_std=1 / 24, **_SMOLLM2
    ),
    "smollm2-360m": dict(
        n_layer=32, n_head=15, n_kv_head=5, n_embd=960, n_inner=2560, **_SMOLLM2
    ),
    "smollm2-1.7b": dict(
        n_layer=24, n_head=32, n_embd=2048, n_inner=8192, **_SMOLLM2 | dict(rope_theta=1.3e5)
    ),
    "tinyllama-1.1b": dict(
        n_layer=22, n_head=32, n_kv_head=4, n_embd=2048, n_inner=5632, vocab_size=32000, block_size=2048, tied=False,
    ),
    "llama-3.2-1b": dict(
        n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, head_dim=64, n_inner=8192, vocab_size=128256,
        block_size=131072, rope_theta=5e5, rope_type="llama3", rope_factor=32.0,
    ),
    # For tests: the demo's vocabulary.
    "llama-nano": dict(
        n_layer=3, n_head=4, n_kv_head=2, n_embd=128, block_size=192, vocab_size=1024, init_std=0.06
    ),
}  # fmt: skip
_VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "dropout": dict(dropout=0.2),
    "lora": dict(lora_rank=8, lora_alpha=16.0),
}
_MADE_OF = {size: (GPTConfig, sizes) for size, sizes in _GPT2.items()} | {
    size: (LlamaConfig, sizes) for size, sizes in _LLAMA.items()
}
CONFIGS: dict[str, type[ModelConfig]] = {kind.family: kind for kind in (GPTConfig, LlamaConfig)}
"""The config of each family, by its name in model.json."""
PRESETS = tuple(
    size + ("/" + variant if variant else "")
    for size, (kind, _) in _MADE_OF.items()
    for variant in _VARIANTS
    if variant != "dropout" or kind is GPTConfig
)
HUB_NAMES = {size: size for size in _GPT2} | {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-nano": "llama-nano",
}
"""What -p huggingface means, by preset without variant."""


def get_configs(name: str) -> ModelConfig:
    """The model preset called `name` (`gpt2`, `gpt2-medium/lora`, `smollm2-135m`, ...); UserError for another."""
    if name not in PRESETS:
        sizes = ", ".join(_MADE_OF)
        raise UserError(f"--config {name}: no such preset; there are {sizes}, or with /lora, GPT-2 also with /dropout")
    size, _, variant = name.partition("/")
    overrides = dict(_VARIANTS[variant])
    if variant == "lora" and size.endswith("-nano"):
        overrides = dict(lora_rank=16, lora_alpha=32.0)  # 128 channels need a larger share of them to move as far
    kind, sizes = _MADE_OF[size]
    return kind(name=name, **sizes, **overrides)


def model_config_from_dict(values: dict[str, Any], where: str) -> ModelConfig:
    """Rebuild a model config from `resolved()` output read from `where`. One without a family is a GPT-2's.

    Raises:
        UserError: a key is unknown or missing, or a value is of the wrong type or out of range.
    """
    values = {"family": GPTConfig.family} | values
    kind = CONFIGS.get(values["family"]) if isinstance(values["family"], str) else None
    if kind is None:
        raise UserError(
            f"{where}: model config is of family {values['family']!r}, this code knows {', '.join(CONFIGS)}; "
            "it was written by another version"
        )
    known = {f.name: f for f in fields(kind)}
    extra, missing = set(values) - set(known), set(known) - set(values)
    if extra or missing:
        raise UserError(
            f"{where}: model config has unknown keys {sorted(extra)} and lacks {sorted(missing)}; "
            "it was written by another version"
        )
    for key, value in values.items():
        default = known[key].default
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(default, bool)):
            raise UserError(f"{where}: model config {key} is {value!r}, expected {kinds[-1].__name__}")
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
