"""The plan's items, held against what real models, optimizers and caches hold; and how it moves with the settings."""

from dataclasses import replace

import pytest
import torch
from setups import LetterTokenizer

from config.configs import PPOConfig, RMConfig, SFTConfig, stage_defaults
from config.model_configs import ModelConfig, get_configs
from models.cache import KVCache
from models.families import load_checkpoint, new_model
from models.generation import generate
from models.weights.checkpoint import save_model
from training.engine.runtime import adamw, trainable
from training.memory.plan import ALWAYS, MemoryPlan, Rows, Sources, plan_memory
from training.memory.sources import plan_sources
from training.start import ppo_start
from utils.template import PromptTemplate

pytestmark = pytest.mark.slow

GB = 1e9


def item(plan: MemoryPlan, name: str) -> float:
    return sum(item.bytes for item in plan.items if item.name == name)


def plan(stage, preset: str, device: str = "cuda", dtype: str = "bf16", reward: ModelConfig | None = None, **settings):
    config, sizes = replace(stage_defaults(stage, preset), **settings), get_configs(preset)
    return plan_memory(config, Sources(sizes, reward or (sizes if stage is PPOConfig else None)), device, dtype, 0.0)


@pytest.mark.parametrize("rm_variant", ["", "/lora"])
@pytest.mark.parametrize("variant", ["", "/lora"])
@pytest.mark.parametrize(("stem", "dtype"), [("gpt2-nano", "fp32"), ("gpt2-nano", "bf16"), ("llama-nano", "bf16")])
def test_weights_and_optimizer_of_ppo_are_those_of_its_real_roles(tmp_path, stem, rm_variant, variant, dtype) -> None:
    """Shared tensors count once, in the models that are loaded as in the plan that never loads them."""
    preset, rm_preset = stem + variant, stem + rm_variant
    tokenizer, description = LetterTokenizer(), {"stage": "sft", "template": PromptTemplate().to_dict()}
    small = dict(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=50, embedding_rows=50)
    if stem == "llama-nano":
        small |= dict(n_kv_head=1, n_inner=24, head_dim=6, tied=False)
    torch.manual_seed(0)
    save_model(new_model(replace(get_configs(stem), **small)), tmp_path / "sft", description)
    reward = load_checkpoint(tmp_path / "sft", "reward", get_configs(rm_preset), adapters="fresh")
    with torch.no_grad():
        for name, p in reward.named_parameters():
            if not rm_variant or name.endswith("lora_B"):
                p.add_(0.01)
    save_model(reward, tmp_path / "rm", description)
    for name in ("sft", "rm"):
        (tmp_path / name / "tokenizer").mkdir()
    config = PPOConfig(
        config=preset, actor=str(tmp_path / "sft"), critic=str(tmp_path / "rm"), response_length=8, dtype=dtype
    )
    made = plan_memory(config, plan_sources(config), "cpu", dtype, 0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.start.load_tokenizer", lambda folder: tokenizer)
        roles = ppo_start(config, None, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    models = [roles.actor, roles.critic, roles.reference, roles.reward_model]
    tensors = {p.data_ptr(): p for model in models for p in model.parameters()}
    held = sum(p.numel() * p.element_size() for p in tensors.values())
    planned = ("frozen base, shared", "frozen base of one model", "weights that train", "adapters and frozen heads")
    assert sum(item(made, name) for name in planned) == held

    params = trainable(roles.actor) + trainable(roles.critic)
    optimizer = adamw([{"name": "x", "params": params, "lr": 1e-3}], (0.9, 0.99), 1e-8, 0.0, torch.device("cpu"))
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moments = sum(x.numel() * 4 for state in optimizer.state.values() for x in state.values() if x.ndim)
    assert item(made, "optimizer (two moments)") == pytest.approx(moments, rel=0.01)  # the head's bias has 1 number
    assert item(made, "gradients") == sum(p.grad.numel() * 4 for p in params)


@pytest.mark.parametrize("preset", ["gpt2-nano", "llama-nano"])
def test_keys_and_values_are_those_of_the_cache(monkeypatch, preset) -> None:
    """The cache that `generate` makes: 128 rows of 47 columns, in fp32 on a CPU even where products are in bf16."""
    options = get_configs(preset)
    config = replace(stage_defaults(PPOConfig, preset), response_length=16, max_length=48, eval_examples=8)
    made, allocate, seen = plan_memory(config, Sources(options, None), "cpu", "bf16", 0.0), KVCache.allocate, []

    def keep(*args):
        seen.append(allocate(*args))
        return seen[0]

    monkeypatch.setattr(KVCache, "allocate", keep)
    with torch.autocast("cpu", torch.bfloat16):
        generate(new_model(options), [[1] * 32] * 128, max_new_tokens=16, eos_id=-1)
    assert item(made, "keys and values") == sum(x.nbytes for x in seen[0].keys + seen[0].values)
    on_gpu = plan_memory(config, Sources(options, None), "cuda", "bf16", 0.0)
    assert item(on_gpu, "keys and values") == item(made, "keys and values") / 2


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SFTConfig(batch_size=4, global_batch_size=8), (4 * 100, 100, 4 * 100, 2)),
        (SFTConfig(batch_size=4, global_batch_size=8, tokens_per_micro_batch=250), (250, 100, 250, 4)),
        (SFTConfig(batch_size=4, global_batch_size=8, tokens_per_micro_batch=30), (100, 100, 100, 8)),
        (SFTConfig(batch_size=4, global_batch_size=8, tokens_per_micro_batch=9999), (800, 100, 800, 1)),
        (SFTConfig(batch_size=4, global_batch_size=8, max_length=40), (160, 40, 160, 2)),
        (RMConfig(batch_size=4, global_batch_size=8), (800, 100, 800, 2)),
        (PPOConfig(batch_size=4, global_batch_size=8, minibatches=2, response_length=25), (400, 100, 100, 1)),
        (PPOConfig(batch_size=4, global_batch_size=8, prompt_length=15, response_length=25), (160, 40, 100, 2)),
    ],
)
def test_rows_of_a_pass(config, expected) -> None:
    rows = Rows.of(config, 100)
    assert (rows.tokens, rows.longest, rows.positions, rows.micro_batches) == expected


def test_savings_show_where_they_should() -> None:
    full = plan(PPOConfig, "gpt2")
    lora, recomputed = plan(PPOConfig, "gpt2/lora"), plan(PPOConfig, "gpt2", activation_checkpointing=True)
    fewer = plan(PPOConfig, "gpt2", tokens_per_micro_batch=2048)
    last = plan(PPOConfig, "gpt2", freeze="last_block")
    assert all(other.peak < full.peak for other in (lora, recomputed, fewer, last))
    # 124M: weights, gradients and two moments of actor and critic, in fp32.
    numbers = 124_439_808
    assert item(full, "optimizer (two moments)") == pytest.approx(2 * 8 * numbers, rel=1e-3)
    assert item(lora, "optimizer (two moments)") < 0.02 * item(full, "optimizer (two moments)")
    assert item(recomputed, "activations") < 0.25 * item(full, "activations")
    assert item(fewer, "activations") == pytest.approx(item(full, "activations") / 4)
    # A reward model trained in full has a base of its own, and so has the critic that starts from it.
    own = plan(PPOConfig, "gpt2/lora", reward=get_configs("gpt2"))
    assert item(own, "frozen base of one model") == pytest.approx(2 * item(own, "frozen base, shared"), rel=0.01)


def test_precision_decides_about_copies() -> None:
    names = ("weights laid out for decoding", "output projections", "autocast's copies of weights")
    full, lora = plan(SFTConfig, "gpt2"), plan(SFTConfig, "gpt2/lora")
    wide, cpu = plan(SFTConfig, "gpt2/lora", dtype="fp32"), plan(SFTConfig, "gpt2/lora", device="cpu")
    assert all(item(wide, name) == 0 for name in names)
    assert item(lora, names[0]) == 0 < item(cpu, names[0]) == item(full, names[0])
    assert item(cpu, names[1]) == 2 * item(lora, names[1]) > 0
    assert item(full, names[2]) > 0 == item(lora, names[2])
    for method in ("lora", "last_block"):  # the actor samples from the table that it shares with the reference
        preset, options = ("gpt2/lora", {}) if method == "lora" else ("gpt2", {"freeze": method})
        gpu, cpu = (item(plan(PPOConfig, preset, device=device, **options), names[1]) for device in ("cuda", "cpu"))
        assert cpu == 2 * gpu > 0


def test_the_table_adds_up() -> None:
    made = plan(PPOConfig, "gpt2-medium/lora", device="cpu")
    lines = [line.split() for line in made.table().splitlines()]
    assert lines[0] == ["load", *ALWAYS] and lines[-1][:2] == ["sum,", "GB"]
    assert [float(x) for x in lines[-1][2:]] == [round(made.of_phase(p) / GB, 3) for p in ("load", *ALWAYS)]
    assert f"{made.peak / GB:.2f} GB" in made.summary() and made.peak_phase in made.summary()
