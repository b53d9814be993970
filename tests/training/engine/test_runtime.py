"""The optimizer's door: what a step does and in which order, weight decay, learning rates, precision, signals."""

import os
import signal

import pytest
import torch
from setups import assert_equal_weights, weights
from torch import nn

from training.engine.runtime import Interrupt, Runtime, adamw, set_lr, trainable


def two_groups(lr: float = 0.1, weight_decay: float = 0.0) -> tuple[dict[str, list[nn.Parameter]], torch.optim.AdamW]:
    torch.manual_seed(0)
    groups = {name: [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2))] for name in ("actor", "critic")}
    named = [{"name": name, "params": params, "lr": lr} for name, params in groups.items()]
    return groups, adamw(named, (0.9, 0.999), 1e-5, weight_decay, torch.device("cpu"))


def total_norm(params) -> torch.Tensor:
    return torch.stack([p.grad.norm() for p in params]).norm()


def test_a_step_clips_each_group_by_its_own_norm_between_backward_and_step(runtime, monkeypatch) -> None:
    groups, optimizer = two_groups()
    prepared = runtime.accelerator.prepare(optimizer)
    (100 * groups["actor"][0].square().sum() + 1e-3 * groups["critic"][0].square().sum()).backward()
    for params in groups.values():
        params[1].grad = torch.zeros_like(params[1])
    raw = {name: total_norm(params) for name, params in groups.items()}
    before = {name: [p.grad.clone() for p in params] for name, params in groups.items()}
    seen = {}

    def spy(*args, **kwargs):
        seen.update({name: [p.grad.clone() for p in params] for name, params in groups.items()})

    monkeypatch.setattr(optimizer, "step", spy)
    norms = runtime.step(prepared, groups, max_norm=1.0)
    assert raw["actor"] > 1 > raw["critic"]
    for name in groups:  # what is told is the norm before clipping
        torch.testing.assert_close(norms[name], raw[name])
    scale = 1.0 / raw["actor"]
    torch.testing.assert_close(seen["actor"], [g * scale for g in before["actor"]], rtol=1e-4, atol=1e-7)
    assert_equal_weights(dict(enumerate(seen["critic"])), dict(enumerate(before["critic"])))
    assert all(p.grad is None for params in groups.values() for p in params)


def test_a_gradient_that_is_not_finite_stops_before_the_step(runtime) -> None:
    groups, optimizer = two_groups()
    before = [p.detach().clone() for params in groups.values() for p in params]
    (groups["critic"][0].sum() * float("inf")).backward()
    with pytest.raises(FloatingPointError, match="gradient of critic is not finite"):
        runtime.step(runtime.accelerator.prepare(optimizer), groups, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, (p for ps in groups.values() for p in ps)))


def test_micro_steps_add_up(runtime) -> None:
    torch.manual_seed(0)
    module = nn.Linear(4, 1)
    optimizer = adamw(
        [{"name": "m", "params": list(module.parameters()), "lr": 0.1}], (0.9, 0.95), 1e-8, 0.0, runtime.device
    )
    model, optimizer = runtime.prepare(module, optimizer)
    x = torch.randn(6, 4)
    model(x).square().sum().div(6).backward()
    whole = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    for part in runtime.accumulate(model, (x[:1], x[1:4], x[4:])):
        runtime.backward(model(part).square().sum() / 6)
    for a, p in zip(whole, module.parameters()):
        torch.testing.assert_close(p.grad, a)


# ---------------------------------------------------------------------------------------------------------------------
# AdamW
# ---------------------------------------------------------------------------------------------------------------------


def test_weight_decay_touches_matrices_only(make_model) -> None:
    model = make_model()
    frozen_name, frozen = next(iter(model.named_parameters()))
    frozen.requires_grad_(False)
    optimizer = adamw(
        [{"name": "m", "params": list(model.parameters()), "lr": 0.1}], (0.9, 0.95), 1e-8, 0.5, torch.device("cpu")
    )
    before = weights(model)
    for p in trainable(model):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, after in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if after.ndim >= 2 and name != frozen_name else 1.0
        torch.testing.assert_close(after, before[name] * factor, msg=name)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.5}


def test_betas_eps_and_default_weight_decay(sft_trainer, rm_trainer, ppo_trainer) -> None:
    for trainer, betas, eps in (
        (sft_trainer(beta2=0.95), (0.9, 0.95), 1e-8),
        (rm_trainer(), (0.9, 0.999), 1e-5),
        (ppo_trainer(), (0.9, 0.999), 1e-5),
    ):
        for group in trainer.optimizer.param_groups:
            assert (tuple(group["betas"]), group["eps"], group["weight_decay"]) == (betas, eps, 0.0)


def test_the_first_step_of_a_tiny_gradient_is_torchs(runtime) -> None:
    """g = 1e-6 and eps 1e-5 move a weight by 0.0909 of the learning rate."""
    p = nn.Parameter(torch.zeros(1))
    optimizer = adamw([{"name": "m", "params": [p], "lr": 1.0}], (0.9, 0.999), 1e-5, 0.0, runtime.device)
    p.grad = torch.full_like(p, 1e-6)
    optimizer.step()
    assert p.item() == pytest.approx(-0.0909, abs=1e-4)


def test_learning_rates_follow_each_groups_peak() -> None:
    groups, optimizer = two_groups(lr=0.1)
    optimizer.param_groups[-1]["peak_lr"] = 0.4
    set_lr(optimizer, 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.05, 0.05, 0.2]
    set_lr(optimizer, 0.25, frozen="actor")  # from the peak, not from where it stood
    assert [(g["name"], g["lr"]) for g in optimizer.param_groups] == [
        ("actor", 0.0), ("actor", 0.0), ("critic", 0.025), ("critic", 0.1),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Device, precision, signals
# ---------------------------------------------------------------------------------------------------------------------


def test_partial_sums_stay_wide_on_a_gpu() -> None:
    matmul = torch.backends.cuda.matmul
    for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        setattr(matmul, name, True)
    Runtime("cpu", "fp32", 0)
    assert not matmul.allow_bf16_reduced_precision_reduction and not matmul.allow_fp16_reduced_precision_reduction


def test_runtime_seeds_every_generator() -> None:
    Runtime("cpu", "fp32", 3)
    first = torch.rand(4)
    assert torch.equal(first, (Runtime("cpu", "fp32", 3), torch.rand(4))[1])
    assert not torch.equal(first, (Runtime("cpu", "fp32", 4), torch.rand(4))[1])


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_a_request_and_handlers_come_back(number, code, capsys) -> None:
    before = signal.getsignal(number)
    interrupt = Interrupt()
    with interrupt.watch():
        os.kill(os.getpid(), number)
        assert interrupt.signal == number and interrupt.exit_code == code
        if number == signal.SIGINT:  # impatience counts
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
    assert "stopping after this step" in capsys.readouterr().err
