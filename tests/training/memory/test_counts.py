"""The counts behind the plan, held against what autograd really saves and what models really hold."""

import pytest
import torch
from torch import nn

from config.model_configs import GPTConfig
from models.gpt import GPT, GPTCritic, GPTRewardModel
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


def tiny(layers: int, **options) -> GPT:
    # With these sizes no activation has as many bytes as the cast of a weight.
    torch.manual_seed(0)
    sizes = dict(name="gpt2-nano", n_head=2, n_embd=48, block_size=64, vocab_size=101)
    return GPT(GPTConfig(**{**sizes, **options}, n_layer=layers)).train()


@pytest.mark.parametrize("method", ["none", "lora"])
@pytest.mark.parametrize(("dtype", "dropout"), [("fp32", 0.0), ("bf16", 0.0), ("fp32", 0.2)])
def test_a_block_keeps_what_the_table_says(dtype, method, dropout) -> None:
    """The difference of two depths is one block, without embeddings and the final LayerNorm."""
    product, options = TYPES[dtype], dict(lora_rank=2 if method == "lora" else 0, dropout=dropout)
    found = []
    for layers in (2, 3):
        model = tiny(layers, **options)
        freeze_weights(model, method)
        round_frozen(model, product)
        found.append(saved_bytes(model, product))
    counted = ROWS * LENGTH * kept_per_token(model.config, product, "cpu", LENGTH)
    assert counted == pytest.approx(found[1] - found[0], rel=0.04)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_recomputed_block_keeps_the_residual_stream_alone(dtype) -> None:
    product = TYPES[dtype]
    found = [saved_bytes(tiny(layers, activation_checkpointing=True), product) for layers in (2, 4)]
    assert found[1] - found[0] == 2 * ROWS * LENGTH * stream_per_token(tiny(1).config)


def test_below_what_trains_nothing_is_kept() -> None:
    found = []
    for layers in (2, 4):
        model = tiny(layers)
        freeze_weights(model, "last_block")
        found.append(saved_bytes(model, torch.float32))
    assert found[0] == found[1] > 0
    config = model.config
    assert [blocks_that_keep(config, m) for m in ("none", "lora", "last_block", "frozen")] == [4, 4, 1, 0]


@pytest.mark.parametrize("method", ["none", "lora", "last_block", "frozen"])
@pytest.mark.parametrize("cls", [GPT, GPTRewardModel, GPTCritic])
@pytest.mark.parametrize("dtype", TYPES)
def test_weights_are_those_of_real_models(method, cls, dtype) -> None:
    config = GPTConfig(name="gpt2-nano", n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=50, lora_rank=2)
    model = cls(config)
    if method == "frozen":
        model.requires_grad_(False)
    else:
        freeze_weights(model, method)
    round_frozen(model, TYPES[dtype])
    counted = count_weights(cls.role, config, method, TYPES[dtype])
    assert counted.bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert counted.trained == sum(p.numel() for p in trained)
    assert (counted.trained_adapters > 0) == (method != "frozen") and counted.table == 50 * 16
    assert counted.table_trains == (method == "none") and counted.all_matrices == 2 * 12 * 16 * 16
