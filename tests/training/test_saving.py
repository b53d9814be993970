"""Checkpoints: what is kept, that a reader never sees half of one, and random generators put back."""

import random

import numpy as np
import pytest
import torch
from setups import LetterTokenizer, assert_equal_weights, weights

from config.user_error import UserError
from models.checkpoint import describe
from models.gpt import GPT, GPTCritic
from training.saving import STATE, Saver, capture_rng, load_state, restore_rng
from utils.run_folder import step_checkpoints


def saver(folder, make_model, keep: int = 2, **models) -> Saver:
    return Saver(folder, models or {"": make_model(GPT)}, LetterTokenizer(), {"stage": "sft"}, keep)


def test_the_newest_steps_are_kept(tmp_path, make_model) -> None:
    writer = saver(tmp_path, make_model, keep=2)
    for step in (1, 2, 10, 9):
        writer.save_step(step, {"step": step})
    assert [p.name for p in step_checkpoints(tmp_path)] == ["step_00000009", "step_00000010"]
    assert load_state(tmp_path / "checkpoints" / "step_00000010") == {"step": 10}
    assert describe(tmp_path / "checkpoints" / "step_00000010")["step"] == 10


def test_final_and_best_stand_beside_them_and_are_replaced_whole(tmp_path, make_model) -> None:
    actor, critic = make_model(GPT), make_model(GPTCritic, seed=1)
    writer = saver(tmp_path, make_model, **{"": actor, "critic": critic})
    writer.save_best(3, "eval/loss", 1.5)
    (tmp_path / "best" / "left-over").write_text("of the last best")
    writer.save_best(7, "eval/loss", 1.25)
    writer.save_final(8, {"step": 8})
    best, final = describe(tmp_path / "best"), describe(tmp_path / "final")
    assert (best["step"], best["eval/loss"], best["stage"]) == (7, 1.25, "sft") and final["step"] == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "final"]  # nothing half-written stays
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == [
        "critic",
        "model.json",
        "model.safetensors",
        "tokenizer",
    ]
    assert (tmp_path / "final" / STATE).is_file()
    assert_equal_weights(weights(GPT.from_checkpoint(tmp_path / "final")), weights(actor))
    assert_equal_weights(weights(GPTCritic.from_checkpoint(tmp_path / "final" / "critic")), weights(critic))


def test_a_crash_while_writing_leaves_the_old_checkpoint(tmp_path, make_model, monkeypatch) -> None:
    writer = saver(tmp_path, make_model)
    writer.save_best(1, "eval/loss", 2.0)

    def crash(*args):
        raise OSError("disk full")

    monkeypatch.setattr(writer.tokenizer, "save", crash)
    with pytest.raises(OSError):
        writer.save_best(2, "eval/loss", 1.0)
    assert describe(tmp_path / "best")["step"] == 1
    monkeypatch.undo()
    writer.save_best(3, "eval/loss", 1.0)
    assert describe(tmp_path / "best")["step"] == 3 and [p.name for p in tmp_path.iterdir()] == ["best"]


def test_random_generators_come_back_through_a_file(tmp_path) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    np.random.normal()  # leaves half a pair behind
    torch.save(capture_rng(), tmp_path / "rng.pt")
    expected = random.random(), np.random.normal(), np.random.random(), torch.rand(3).tolist()
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    restore_rng(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert (random.random(), np.random.normal(), np.random.random(), torch.rand(3).tolist()) == expected


def test_a_state_that_cannot_be_read_is_the_users_error(tmp_path) -> None:
    with pytest.raises(UserError, match=f"--resume {tmp_path}: no {STATE}"):
        load_state(tmp_path)
    (tmp_path / STATE).write_bytes(b"PK torn")
    with pytest.raises(UserError, match="cannot be read .*earlier checkpoint"):
        load_state(tmp_path)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_nothing_in_a_state_is_unpickled(tmp_path) -> None:
    torch.save({"step": Evil()}, tmp_path / STATE)
    with pytest.raises(UserError, match="cannot be read"):
        load_state(tmp_path)
