"""Adapters, what trains, merging, and one frozen base for several roles."""

import copy
import re

import pytest
import torch
from every_family import EVERY
from torch import nn

from config.model_configs import get_configs
from config.user_error import UserError
from models.families import load_checkpoint, new_model
from models.lora import is_adapter, merge_lora, round_frozen, share_base
from models.weights.checkpoint import save_model

FAMILIES = EVERY
ROLES = ["actor", "critic", "reward"]
PROJECTIONS = {"gpt2": 4, "llama": 7}
"""Of a block."""


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    """The first block's, by name."""
    return {name: layer for name, layer in model.blocks[0].named_modules() if isinstance(layer, nn.Linear)}


@pytest.fixture
def batch(padded, random_rows):
    return padded(random_rows([9, 4, 12]), 2, "left")


def zero_b(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.zero_()
    return model


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, projections, numbers",
    [
        ("gpt2/lora", 12 * 4, 1_179_648),  # c_attn, both c_proj and c_fc of each block
        # q, k, v, o: 576 -> 576, 192, 192, 576; gate, up, down: 576 <-> 1,536.
        ("smollm2-135m/lora", 30 * 7, 30 * 8 * (2 * 1152 + 2 * 768 + 3 * 2112)),
    ],
)
def test_adapters_at_rank_8(preset, projections, numbers):
    with torch.device("meta"):
        model = new_model(get_configs(preset))
    adapters = {name: p for name, p in model.named_parameters() if is_adapter(name)}
    assert model.config.lora_rank == 8
    assert len(adapters) == projections * 2
    assert sum(p.numel() for p in adapters.values()) == numbers


def test_fresh_adapters_change_no_bit(make_model, family, batch, tmp_path):
    plain = make_model()
    save_model(plain, tmp_path)
    torch.manual_seed(0)
    adapted = load_checkpoint(tmp_path, config=get_configs(f"{family}-nano/lora")).eval()
    names = [name for name, _ in adapted.named_parameters() if is_adapter(name)]
    assert len(names) == 2 * PROJECTIONS[family] * 2
    for name in names:
        parameter = adapted.get_parameter(name)
        assert (parameter == 0).all() if name.endswith("lora_B") else parameter.std() > 0.05
    assert torch.equal(adapted(*batch), plain(*batch))


def test_loaded_adapters_start_as_loralibs_do(make_model, family, tmp_path):
    """A uniform in +-1/sqrt(n_in) (Kaiming with a = sqrt(5)), as in a module made without a checkpoint."""
    save_model(make_model(n_embd=64), tmp_path)
    torch.manual_seed(0)
    loaded = load_checkpoint(tmp_path, config=get_configs(f"{family}-nano/lora"))
    made = new_model(loaded.config)
    for model in (loaded, made):
        for layer in projections(model).values():
            limit = 1 / layer.in_features**0.5
            assert layer.lora_A.shape == (16, layer.in_features)
            assert 0.95 * limit < layer.lora_A.abs().max() <= limit
            assert layer.lora_A.std().item() == pytest.approx(limit / 3**0.5, rel=0.1)


def test_adapter_output_is_scaled_by_alpha_over_rank(make_model):
    for layer in projections(make_model(lora_rank=4, lora_alpha=12.0)).values():
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        by_hand = x @ layer.weight.T + 3.0 * (x @ layer.lora_A.T) @ layer.lora_B.T
        torch.testing.assert_close(layer(x), by_hand if layer.bias is None else by_hand + layer.bias)


def test_an_adapter_over_a_packed_weight_in_half_precision(make_model, monkeypatch):
    """The packed weight gives a product of its own type, to which the fp32 adapter adds."""
    layer = list(projections(make_model(lora_rank=4)).values())[-1]
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    plain = layer(x)

    def packed(x, weight, bias, packed):
        return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    monkeypatch.setattr("models.kernels._packed", lambda x, weight, bias: weight)
    monkeypatch.setattr("models.cpu.packing.frozen_linear", packed)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), plain, atol=0.05, rtol=0.05)


def test_adapter_dropout_acts_in_training_only(make_model, batch):
    model = make_model(lora_rank=4, lora_dropout=0.3)
    assert torch.equal(model(*batch), make_model(lora_rank=4)(*batch))
    model.train()
    assert not torch.equal(model(*batch), model(*batch))


def test_changing_mode_never_merges(make_model, batch, tmp_path):
    """loralib merges on eval() unless told otherwise; saved then and loaded again, adapters would count twice."""
    model = make_model(lora_rank=4)
    before, outputs = bits(model), model(*batch)
    for _ in range(3):
        model.train()
        model.eval()
    assert same(bits(model), before)
    save_model(model, tmp_path)
    loaded = load_checkpoint(tmp_path)
    for mode in (True, False, True, False):
        loaded.train(mode)
        assert torch.equal(loaded(*batch), outputs)
    assert same(bits(loaded), before)


# ---------------------------------------------------------------------------------------------------------------------
# Merging
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("role", ["lm", *ROLES])
def test_merged_model_computes_what_the_adapted_one_does(make_model, batch, role, rank):
    model = make_model(role, lora_rank=rank)
    if role in ("critic", "reward"):
        model.set_normalisation(1.5, 0.3)
    before, outputs = bits(model), model(*batch)
    merged = merge_lora(model)
    assert type(merged) is type(model) and merged.config.lora_rank == 0 and not merged.training
    assert not any(is_adapter(key) for key in merged.state_dict())
    torch.testing.assert_close(merged(*batch), outputs, atol=5e-5, rtol=1e-5)  # logits of about 10
    assert (zero_b(copy.deepcopy(model))(*batch) - outputs).abs().max() > 0.1  # the adapters do matter here
    assert same(bits(model), before)
    merged.token_table.data.zero_()
    assert same(bits(model), before)


def test_merging_a_plain_model_copies_it(make_model):
    model = make_model()
    merged = merge_lora(model)
    assert same(bits(merged), bits(model))
    merged.token_table.data.zero_()
    assert model.token_table.any()


# ---------------------------------------------------------------------------------------------------------------------
# What trains
# ---------------------------------------------------------------------------------------------------------------------


def trains(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("role", ["lm", *ROLES])
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_freeze_methods(make_model, family, role, layers):
    model = make_model(role, lora_rank=2, n_layer=layers)
    names = {name for name, _ in model.named_parameters()}
    head = {name for name in names if name.startswith("head.")}
    assert head == (set() if role in ("lm", "actor") else {"head.weight", "head.bias"})
    last = {
        "gpt2": (f"transformer.h.{layers - 1}.", "transformer.ln_f."),
        "llama": (f"model.layers.{layers - 1}.", "model.norm."),
    }[family]
    assert ("output.weight" in names) == (family == "llama" and role in ("lm", "actor"))
    model.freeze_weights("lora")
    assert trains(model) == head | {name for name in names if is_adapter(name)}
    model.freeze_weights("last_block")
    assert trains(model) == head | {name for name in names if name.startswith(last)}
    model.freeze_weights("none")
    assert trains(model) == names


@pytest.mark.parametrize("role", ["lm", "critic"])
def test_wrong_freeze_methods_are_refused(make_model, role):
    plain, adapted = make_model(role), make_model(role, lora_rank=2)
    for model, method in [(plain, "lora"), (plain, "head"), (adapted, "all"), (adapted, "")]:
        model.freeze_weights("last_block")
        before = trains(model)
        with pytest.raises(UserError, match="--freeze"):
            model.freeze_weights(method)
        assert trains(model) == before


@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_learn_over_frozen_embeddings(make_model, batch, recompute):
    """Reentrant checkpointing gives no gradient at all here: nothing that goes into the first block requires one."""
    gradients = []
    for option in (False, recompute):
        model = make_model(lora_rank=2, activation_checkpointing=option).train()
        model.freeze_weights("lora")
        model(*batch)[batch[1]].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(gradients[1]) == {name for name, _ in model.named_parameters() if is_adapter(name)}
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


def test_frozen_weights_keep_every_bit_over_steps(make_model, batch):
    model = make_model("critic", lora_rank=2).train()
    model.freeze_weights("lora")
    before = bits(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        model(*batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, value in model.state_dict().items():
        moved = is_adapter(key) or key in ("head.weight", "head.bias")
        assert torch.equal(value, before[key]) != moved, key


# ---------------------------------------------------------------------------------------------------------------------
# One frozen base
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def roles(make_model):
    """Reference, actor, critic and reward model as PPO has them: one base, own adapters, own heads."""
    reference = make_model().requires_grad_(False)
    others = [make_model(role, seed=seed, lora_rank=2) for seed, role in enumerate(ROLES, 1)]
    for model in others:
        model.load_state_dict(reference.state_dict(), strict=False)
        model.freeze_weights("lora")
    others[2].requires_grad_(False)
    return [reference, *others]


def storages(model: nn.Module) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def test_equal_frozen_tensors_are_held_once(roles, batch):
    outputs = [model(*batch) for model in roles]
    base = [sum(p.nbytes for name, p in roles[0].named_parameters() if name in storages(model)) for model in roles]
    assert share_base(roles) == sum(base[1:])
    assert share_base(roles) == 0
    for model, expected in zip(roles, outputs, strict=True):
        assert torch.equal(model(*batch), expected)
        for name, pointer in storages(model).items():
            assert (pointer == storages(roles[0]).get(name)) == (name in storages(roles[0]))


@pytest.mark.parametrize("move", ["one by one", "in one module"])
def test_sharing_outlives_a_move(roles, batch, move):
    share_base(roles)
    if move == "one by one":
        for model in roles:
            model.to(torch.float64)
    else:
        nn.ModuleList(roles).to(torch.float64)
    for model in roles[1:]:
        shared = storages(model).items() & storages(roles[0]).items()
        assert {name for name, _ in shared} == storages(roles[0]).keys() & storages(model).keys()
        assert all(p.dtype == torch.float64 for p in model.parameters())


def test_what_trains_is_never_shared(make_model):
    for first_trains, second_trains in [(True, True), (True, False), (False, True)]:
        models = [make_model().requires_grad_(first_trains), make_model().requires_grad_(second_trains)]
        assert share_base(models) == 0
        assert not storages(models[0]).items() & storages(models[1]).items()


@pytest.mark.parametrize("change", ["last bit", "sign of zero", "shape", "dtype"])
def test_tensors_that_differ_are_not_shared(make_model, change):
    first, second = make_model().requires_grad_(False), make_model().requires_grad_(False)
    name = next(name for name, _ in first.named_parameters() if re.search(r"1\.mlp\.(c_fc|gate_proj)\.weight", name))
    for model in (first, second):
        model.get_parameter(name).view(-1)[5] = 0.0
    parameter = second.get_parameter(name)
    if change == "last bit":
        parameter.view(-1)[3] = torch.nextafter(parameter.view(-1)[3], torch.tensor(torch.inf))
    elif change == "sign of zero":
        parameter.view(-1)[5] = -0.0
    elif change == "shape":
        parameter.data = parameter.data.t().contiguous()
    else:
        parameter.data = parameter.data.double()
    total = sum(p.numel() * p.element_size() for p in first.parameters())
    assert share_base([first, second]) == total - first.get_parameter(name).nbytes
    assert first.get_parameter(name) is not parameter


def test_outputs_do_not_depend_on_who_is_asked_first(roles, batch):
    share_base(roles)
    forwards = [model(*batch) for model in roles]
    backwards = [model(*batch) for model in reversed(roles)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))


def test_training_one_role_moves_no_other(roles, batch):
    """At the start the actor is the reference; then only the actor changes, and no gradient goes elsewhere."""
    reference, actor, critic, reward = roles
    zero_b(actor)
    share_base(roles)
    assert torch.equal(actor(*batch), reference(*batch))
    before = [model(*batch) for model in (reference, critic, reward)]
    optimizer = torch.optim.SGD([p for p in actor.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        actor.train()(*batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(actor(*batch), reference(*batch))
    for model, expected in zip((reference, critic, reward), before, strict=True):
        assert torch.equal(model(*batch), expected)
        assert all(p.grad is None for p in model.parameters())


def test_checkpoints_of_sharing_models_are_whole(roles, batch, tmp_path):
    share_base(roles)
    for i, model in enumerate(roles):
        save_model(model, tmp_path / str(i))
        assert torch.equal(type(model).from_checkpoint(tmp_path / str(i)).eval()(*batch), model(*batch))


def test_two_adapters_of_one_config_are_independent(make_model):
    config = make_model(lora_rank=2).config
    for one, other in zip(*(projections(new_model(config)).values() for _ in range(2)), strict=True):
        assert not torch.equal(one.lora_A, other.lora_A)


@torch.no_grad()
def test_frozen_matrices_rounded_once_give_the_bits_of_autocast(make_model, batch):
    model = make_model("actor", lora_rank=2)
    model.freeze_weights("lora")
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.hidden(*batch)
        trains = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
        round_frozen(model, torch.bfloat16)
        assert torch.equal(model.hidden(*batch), expected)
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    for name, parameter in model.named_parameters():
        matrix = id(parameter) in matrices
        assert parameter.dtype == (torch.bfloat16 if matrix else torch.float32), name
        assert name not in trains or torch.equal(parameter, trains[name])


@torch.no_grad()
def test_rounded_roles_share_one_base_and_come_back_from_disk_rounded(roles, batch, tmp_path):
    for model in roles:
        round_frozen(model, torch.bfloat16)
    base = [sum(p.nbytes for name, p in roles[0].named_parameters() if name in storages(model)) for model in roles]
    assert share_base(roles) == sum(base[1:])
    save_model(roles[1], tmp_path / "actor")
    again = load_checkpoint(tmp_path / "actor", "actor")
    again.freeze_weights("lora")
    round_frozen(again, torch.bfloat16)
    assert share_base([roles[0], again]) == base[1]


@torch.no_grad()
def test_merging_into_rounded_weights_keeps_a_small_update(make_model):
    """bf16 has three digits: a delta of a thousandth of the weight must not vanish in the sum."""
    model = make_model(lora_rank=2)
    model.freeze_weights("lora")
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.mul_(0.03)
    round_frozen(model, torch.bfloat16)
    merged = projections(merge_lora(model))
    for name, layer in projections(model).items():
        delta = layer.lora_B @ layer.lora_A * layer.scaling
        assert merged[name].weight.dtype == torch.float32
        torch.testing.assert_close(merged[name].weight - layer.weight.float(), delta, atol=1e-6, rtol=0)
