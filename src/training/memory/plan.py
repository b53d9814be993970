"""What a run will have in memory, item by item and phase by phase, computed from its settings alone.

Models are built on the meta device and counted; activations, logits, caches and copies follow from their shapes (the
counts are in `training.memory.counts`). Nothing is loaded. Rows are taken to be as long as they may be.

A run goes through phases, and its peak is the largest of them:

    load      models come from disk, one after another, each in fp32 with its file beside it (CPU only)
    rollout   responses are sampled: keys and values of all rows, the logits of one step
    score     log-probabilities, values and scores of the sampled rows, without gradients
    pass      the end of a micro-batch's forward pass: all that the backward pass needs, the logits of a block
    step      the end of the backward pass: all gradients
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from config.configs import PPOConfig, RMConfig, RunConfig, SFTConfig
from config.devices import TORCH_TYPE
from config.model_configs import ModelConfig
from models.kernels import cache_dtype
from models.vocabulary import BLOCK, slice_size
from training.memory import counts
from training.memory.counts import Weights, count_weights
from training.sampling import SFT_SAMPLES, cached_tokens
from training.start import freeze_method

PHASES = ("load", "rollout", "score", "pass", "step")
ALWAYS = ("rollout", "score", "pass", "step")
COMPLETIONS = 2  # of a ranked row; rankings of more are known only when the data are read


@dataclass(frozen=True)
class Sources:
    """Sizes of what a stage starts from, and what could not be known.

    sft: the model that trains or starts everything (-p, -a). reward: what -c holds, as saved; None without a reward
    model. notes: one line each.
    """

    sft: ModelConfig
    reward: ModelConfig | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Role:
    """One model of a run.

    kind: "lm", "critic" or "reward". method: of freezing ("frozen" for one that only looks). same_base: whether its
    base equals the first's. samples: whether it does. logprobs: whether log-probabilities are taken of it.
    """

    kind: str
    config: ModelConfig
    method: str = "frozen"
    same_base: bool = True
    samples: bool = False
    logprobs: bool = False

    def weights(self, dtype: torch.dtype) -> Weights:
        """What it holds where matrix products are of this type."""
        return count_weights(self.kind, self.config, self.method, dtype)


@dataclass(frozen=True)
class Item:
    """Bytes that are there in some of the phases."""

    name: str
    bytes: float
    phases: tuple[str, ...]


@dataclass(frozen=True)
class MemoryPlan:
    """All items of a run; `longest`: tokens of its longest row."""

    items: tuple[Item, ...]
    longest: int
    notes: tuple[str, ...] = ()

    def of_phase(self, phase: str) -> float:
        """Bytes in a phase."""
        return sum(item.bytes for item in self.items if phase in item.phases)

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(PHASES, key=self.of_phase)

    @property
    def peak(self) -> float:
        """Bytes at the peak."""
        return self.of_phase(self.peak_phase)

    def table(self) -> str:
        """Every item in every phase, in GB (1e9 bytes)."""
        phases = [phase for phase in PHASES if self.of_phase(phase)]
        name_width = max(len(item.name) for item in self.items) + 2
        lines = [" " * name_width + "".join(f"{phase:>9}" for phase in phases)]
        for item in self.items:
            if item.bytes >= 5e4:
                cells = (f"{item.bytes / 1e9:9.3f}" if phase in item.phases else " " * 9 for phase in phases)
                lines.append(f"{item.name:<{name_width}}" + "".join(cells))
        lines.append(f"{'sum, GB':<{name_width}}" + "".join(f"{self.of_phase(phase) / 1e9:9.3f}" for phase in phases))
        return "\n".join(line.rstrip() for line in lines)

    def summary(self, there: str = "") -> str:
        """The peak, `there` (what the device has), and what the peak is made of, on one line."""
        parts = [item for item in self.items if self.peak_phase in item.phases and item.bytes >= 0.005 * self.peak]
        told = ", ".join(f"{item.name} {item.bytes / 1e9:.2f}" for item in parts)
        return f"peak {self.peak / 1e9:.2f} GB{there} ({self.peak_phase}): {told}"


def plan_memory(config: RunConfig, sources: Sources, device: str, dtype: str, base: float) -> MemoryPlan:
    """The plan of a run.

    Args:
        config: of the stage; `tokens_per_micro_batch` a number. sources: sizes of the models it starts from.
        device: cpu, cuda or mps. dtype: fp32, bf16 or fp16, both resolved.
        base: bytes that the process (CPU) or the context (GPU) takes beside what is planned here.
    """
    product = TORCH_TYPE[dtype]
    roles = roles_of(config, sources)
    rows = Rows.of(config, roles[0].config.block_size)
    items = [Item("process and libraries", base, PHASES if device == "cpu" else ALWAYS)]
    if device == "cpu":
        items.append(Item("loading", _loading(roles, product), ("load",)))
    items += _weights(roles, product) + _copies(roles, product, device)
    items += _rollout(config, roles, rows, product, device)
    items += _passes(config, roles, rows, product, device)
    return MemoryPlan(tuple(item for item in items if item.bytes), rows.longest, sources.notes)


def roles_of(config: RunConfig, sources: Sources) -> list[Role]:
    """The models of a stage in the order in which they are loaded."""
    trains = replace(sources.sft, activation_checkpointing=config.activation_checkpointing)
    method = freeze_method(config, trains)
    plain = replace(sources.sft, lora_rank=0)
    if isinstance(config, SFTConfig):
        return [Role("lm", trains, method, samples=True, logprobs=True)]
    trains = replace(trains, dropout=0.0)
    if isinstance(config, RMConfig):
        return [Role("lm", plain, samples=True), Role("reward", trains, method)]
    reward = sources.reward
    # A reward model that trained all its weights has a base of its own, and so has a critic that starts from it.
    same = reward is None or reward.lora_rank > 0
    kept = reward is None or (reward.lora_rank, reward.lora_alpha) == (trains.lora_rank, trains.lora_alpha)
    reference = Role("lm", plain, logprobs=True)
    actor = Role("lm", trains, method, samples=True, logprobs=True)
    critic = Role("critic", trains, method, same and kept)
    if reward is None or (config.reward_fn and not config.reward_fn_weight):
        return [reference, actor, critic]
    return [reference, Role("reward", replace(reward, dropout=0.0), same_base=same), actor, critic]


@dataclass(frozen=True)
class Rows:
    """Shapes of a run's passes: tokens of the largest micro-batch (padding included) and of the longest row, how many
    of the former meet the vocabulary or the head, micro-batches behind an optimizer step."""

    tokens: int
    longest: int
    positions: int
    micro_batches: int

    @classmethod
    def of(cls, config: RunConfig, context: int) -> Rows:
        """For rows that are all as long as they may be."""
        longest = min(config.max_length or context, context)
        sequences, step = 1, config.global_batch_size
        if isinstance(config, RMConfig):
            sequences = COMPLETIONS
        if isinstance(config, PPOConfig):
            longest = min(longest, (config.prompt_length or longest) + config.response_length)
            step = math.ceil(config.global_batch_size / config.minibatches)
        limit = config.tokens_per_micro_batch
        rows = min(step, max(1, limit // (sequences * longest)) if limit else config.batch_size)
        tokens = rows * sequences * longest
        if limit and rows < step:
            tokens = max(tokens, limit)  # shorter rows fill the budget
        positions = tokens
        if isinstance(config, PPOConfig):
            positions = min(tokens, math.ceil(tokens * config.response_length / longest))
        return cls(tokens, longest, positions, math.ceil(step / rows))


def _weights(roles: list[Role], product: torch.dtype) -> list[Item]:
    found = [(role, role.weights(product)) for role in roles]
    shared = max(w.base for role, w in found if role.same_base)
    numbers = sum(w.trained for _, w in found)
    adapters = sum(w.trained_adapters for _, w in found)
    return [
        Item("frozen base, shared", shared, ALWAYS),
        Item("frozen base of one model", sum(w.base for role, w in found if not role.same_base), ALWAYS),
        Item("weights that train", 4 * (numbers - adapters), ALWAYS),
        Item("adapters and frozen heads", 4 * adapters + sum(w.own for _, w in found), ALWAYS),
        Item("optimizer (two moments)", 8 * numbers, ALWAYS),
    ]


def _loading(roles: list[Role], product: torch.dtype) -> float:
    """Most bytes of models while they are loaded: those before, and one in fp32 with its file."""
    most = held = shared = 0
    for role in roles:
        w = role.weights(product)
        whole = count_weights(role.kind, role.config, "none", torch.float32).bytes
        most = max(most, held + 2 * whole)
        held += w.bytes - (min(w.base, shared) if role.same_base else 0)
        shared = shared or w.base  # the first model's
    return most


def _copies(roles: list[Role], product: torch.dtype, device: str) -> list[Item]:
    """Copies of weights for decoding and for the vocabulary (models.cpu.packing, models.vocabulary.OutputTable)."""
    if product == torch.float32:
        return []
    decoding = tables = 0
    for i, role in enumerate(roles):
        w = role.weights(product)
        if role.samples:
            # Where a frozen weight has the product's type already, only a CPU needs another layout of it.
            decoding += 2 * (w.all_matrices if device == "cpu" else w.trained_matrices)
        if (role.samples or role.logprobs) and (w.table_trains or i == 0 or not role.same_base):
            tables += 2 * w.table  # centred
        if role.samples and device == "cpu":
            tables += 2 * w.table  # its packed twin, which serves decoding
    return [Item("weights laid out for decoding", decoding, ALWAYS), Item("output projections", tables, ALWAYS)]


def _rollout(config: RunConfig, roles: list[Role], rows: Rows, product: torch.dtype, device: str) -> list[Item]:
    model = next(role.config for role in roles if role.samples)
    if isinstance(config, SFTConfig):
        new, wanted, longest = config.sample_tokens, min(SFT_SAMPLES, config.eval_examples), model.block_size
        if config.max_length:
            longest = min(longest, config.max_length + new)
    elif isinstance(config, RMConfig):
        new, wanted, longest = config.response_length, config.normalise_prompts, rows.longest
    else:
        wanted = max(config.global_batch_size, config.eval_examples)
        new, longest = config.response_length, rows.longest
    sizes = (config.batch_size, config.tokens_per_micro_batch, config.activation_checkpointing)
    together = max(1, min(wanted, cached_tokens(model.block_size, *sizes) // longest))
    cached = cache_dtype(device, product).itemsize
    cache = 2 * model.n_layer * together * (longest - 1) * model.n_kv_head * model.head_dim * cached
    # The prompts' pass: one block in work, and the stream.
    kept = counts.kept_per_token(replace(model, dropout=0.0), product, device, longest, "frozen")
    prompts = together * max(1, longest - new) * (kept + counts.stream_per_token(model))
    logits = counts.SAMPLED_LOGIT_BYTES * together * model.vocab_size
    stored = wanted * (longest * 18 + new * 33) if isinstance(config, PPOConfig) else 0
    return [
        Item("keys and values", cache, ("rollout",)),
        Item("prompts' pass or a step's logits", max(prompts, logits), ("rollout",)),
        Item("rollouts' tokens and figures", stored, ALWAYS),
    ]


def _passes(config: RunConfig, roles: list[Role], rows: Rows, product: torch.dtype, device: str) -> list[Item]:
    """Items of the score, pass and step phases."""
    half = product != torch.float32
    training = [role for role in roles if role.method != "frozen"]
    activations = in_work = gradients = casts = tables = 0
    for role in training:
        w, d = role.weights(product), role.config.n_embd
        kept = rows.tokens * counts.kept_per_token(role.config, product, device, rows.longest, role.method)
        stream = rows.tokens * counts.stream_per_token(role.config)
        blocks = counts.blocks_that_keep(role.config, role.method)
        recomputes = role.config.activation_checkpointing
        activations += blocks * (stream if recomputes else kept)
        activations += 2 * stream + 2 * 4 * d * rows.positions  # the final LayerNorm, what goes into loss or head
        # A block in work needs about as much beyond what it keeps; a recomputed one first has to be made again.
        in_work = max(in_work, kept * (2 if recomputes else 1))
        gradients += 4 * w.trained
        casts += 2 * w.trained_matrices if half else 0  # kept by autocast for the length of a pass
        if w.table_trains:
            tables = max(tables, counts.TABLE_WORK * 4 * w.table)
    items = [
        Item("activations", activations, ("pass",)),
        Item("gradients so far", gradients if rows.micro_batches > 1 else 0, ("pass",)),
        Item("gradients", gradients, ("step",)),
        Item("a block in work", in_work, ("score", "pass", "step")),
        Item("autocast's copies of weights", casts, ("score", "pass", "step")),
        Item("token table's gradient on its way", tables, ("pass", "step")),
    ]
    if any(role.logprobs for role in training):
        vocabulary = training[0].config.vocab_size
        once = half and isinstance(config, SFTConfig)
        per_logit = counts.LOGIT_BYTES_TAKEN_ONCE if once else counts.LOGIT_BYTES
        logits = min(per_logit * rows.positions * vocabulary, max(BLOCK, per_logit * vocabulary))
        logits += counts.SLICE_BYTES * min(rows.positions * vocabulary, slice_size(device))
        phases = ("score", "pass") if isinstance(config, PPOConfig) else ("pass",)
        items.append(Item("logits of a block", logits, phases))
    if device == "cpu":
        shares = counts.HEAP_HOLES_OF_ADAPTERS if roles[-1].config.lora_rank else counts.HEAP_HOLES
        items.append(Item("holes in the heap", shares[product.itemsize] * activations, ("pass",)))
    return items
