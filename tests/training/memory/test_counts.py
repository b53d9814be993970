"""The counts behind the plan, held against what autograd really saves and what models really hold."""

import pytest
import torch
from torch import nn

from config.model_configs import CONFIGS
from models.causal_lm import CausalLM
from models.families import new_model
from models.lora import freeze_weights, round_frozen
from training.memory.counts import blocks_that_keep, count_weights, kept_per_token, stream_per_token

pytestmark = pytest.mark.slow

ROWS, LENGTH = 3, 40
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def saved_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes that the backward pass of `model.hidden` needs, storages counted once, parameters and casts of them not."""
    found: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(model.config.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden = model.hidden(ids, right_padded=True)
    sizes = {p.numel() for p in model.parameters()}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    casts = {2 * n for n in sizes} if dtype == torch.bfloat16 else set()
    del hidden
    return sum(s.nbytes() for pointer, s in found.items() if pointer not in own and s.nbytes() not in casts)


# With these sizes no activation has as many bytes as the cast of a weight.
SHAPES = {
    "gpt2": ("gpt2", dict(n_head=2)),
    "gpt2 with dropout": ("gpt2", dict(n_head=2, dropout=0.2)),
    "llama": ("llama", dict(n_head=4, n_inner=136)),
    "llama of shared heads": ("llama", dict(n_head=6, n_kv_head=2, n_inner=136)),
    "llama of wide heads, untied": ("llama", dict(n_head=4, n_kv_head=1, head_dim=26, n_inner=80, tied=False)),
}


def tiny(layers: int, shape: str = "gpt2", **options) -> CausalLM:
    torch.manual_seed(0)
    family, sizes = SHAPES[shape]
    common = dict(name=f"{family}-nano", n_embd=48, block_size=64, vocab_size=101)
    return new_model(CONFIGS[family](**{**common, **sizes, **options}, n_layer=layers)).train()


@pytest.mark.parametrize("method", ["none", "lora"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_keeps_what_the_table_says(shape, dtype, method) -> None:
    """The difference of two depths is one block, without embeddings and the final norm."""
    product, options = TYPES[dtype], dict(lora_rank=1 if method == "lora" else 0)
    if shape == "gpt2 with dropout" and dtype == "bf16":
        pytest.skip("on a CPU attention with dropout is counted in fp32")
    found = []
    for layers in (2, 3):
        model = tiny(layers, shape, **options)
        freeze_weights(model, method)
        round_frozen(model, product)
        found.append(saved_bytes(model, product))
    counted = ROWS * LENGTH * kept_per_token(model.config, product, "cpu", LENGTH, method)
    assert counted == pytest.approx(found[1] - found[0], rel=0.04)


def test_flash_attention_on_a_gpu_keeps_keys_and_values_that_are_shared_once() -> None:
    config = tiny(1, "llama of shared heads").config
    kept = {on: kept_per_token(config, torch.bfloat16, on, LENGTH, "lora") for on in ("cpu", "cuda")}
    sums = 4 * config.n_head  # which a CPU makes again
    assert kept["cpu"] - kept["cuda"] == 2 * 2 * (6 - 2) * 8 - sums
    wide = {on: kept_per_token(config, torch.float32, on, LENGTH, "lora") for on in ("cpu", "cuda")}
    assert wide["cpu"] == wide["cuda"]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", ["gpt2", "llama of shared heads"])
def test_a_recomputed_block_keeps_the_residual_stream_alone(shape, dtype) -> None:
    product = TYPES[dtype]
    found = [saved_bytes(tiny(layers, shape, activation_checkpointing=True), product) for layers in (2, 4)]
    assert found[1] - found[0] == 2 * ROWS * LENGTH * stream_per_token(tiny(1).config)


@pytest.mark.parametrize("shape", ["gpt2", "llama of shared heads"])
def test_below_what_trains_nothing_is_kept(shape) -> None:
    found = []
    for layers in (2, 4):
        model = tiny(layers, shape)
        freeze_weights(model, "last_block")
        found.append(saved_bytes(model, torch.float32))
    assert found[0] == found[1] > 0
    config = model.config
    assert [blocks_that_keep(config, m) for m in ("none", "lora", "last_block", "frozen")] == [4, 4, 1, 0]


@pytest.mark.parametrize("method", ["none", "lora", "last_block", "frozen"])
@pytest.mark.parametrize("role", ["lm", "reward", "critic"])
@pytest.mark.parametrize("shape", ["gpt2", "llama of shared heads", "llama of wide heads, untied"])
@pytest.mark.parametrize("dtype", TYPES)
def test_weights_are_those_of_real_models(method, role, shape, dtype) -> None:
    config = tiny(2, shape, lora_rank=2).config
    model = new_model(config, role)
    if method == "frozen":
        model.requires_grad_(False)
    else:
        freeze_weights(model, method)
    round_frozen(model, TYPES[dtype])
    counted = count_weights(role, config, method, TYPES[dtype])
    assert counted.bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert counted.trained == sum(p.numel() for p in trained)
    assert (counted.trained_adapters > 0) == (method != "frozen") and counted.table == 101 * 48
    assert counted.table_trains == (method == "none")
    assert counted.all_matrices == sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def test_an_output_table_of_its_own_is_in_language_models_alone() -> None:
    """Its gradients are what the pass works on; a critic has but the table of its inputs."""
    tied, own = (tiny(2, "llama of wide heads, untied", tied=tied).config for tied in (True, False))
    size = 101 * 48
    for role, more in (("lm", size), ("reward", 0), ("critic", 0)):
        a, b = (count_weights(role, config, "none", torch.float32) for config in (tied, own))
        assert b.trained - a.trained == more and a.table == b.table == size and b.table_trains
