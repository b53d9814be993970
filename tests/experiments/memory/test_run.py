"""`-t memory`: which presets fit a 16 GB GPU, said in the documentation as the plan says it."""

import argparse
from pathlib import Path

import pytest

from config.user_error import UserError
from experiments.memory import run as memory
from experiments.memory.run import CHECKED, STAGES, cases, cell, presets, table

pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).resolve().parents[3] / "docs/memory.md"


def test_the_document_holds_the_table_of_the_command(capsys) -> None:
    assert memory.run(argparse.ArgumentParser(), []) == 0
    printed = capsys.readouterr().out
    assert printed == table(16.0) + "\n"
    assert printed in DOCUMENT.read_text(encoding="utf-8"), "run `main.py -t memory` and put its table there"


def test_every_preset_with_adapters_fits_16_gb_in_every_stage_and_the_document_names_the_rest() -> None:
    fits = {(stage, preset): cell(stage, preset, 16.0).fits for stage in STAGES for preset in presets()}
    too_large = {(stage, preset) for (stage, preset), fit in fits.items() if not fit}
    never = ("gpt2-large", "gpt2-xl", "smollm2-1.7b", "tinyllama-1.1b", "llama-3.2-1b")
    large = {(stage, preset) for stage in STAGES for preset in never}
    assert too_large == large | {("ppo", "gpt2-medium"), ("ppo", "smollm2-360m")}


def test_a_larger_gpu_holds_more() -> None:
    assert (
        cell("ppo", "gpt2-medium", 80.0).fits and cell("sft", "gpt2", 80.0).largest > cell("sft", "gpt2", 16.0).largest
    )


def test_cases_cover_stages_training_and_precision() -> None:
    assert {(c.stage, c.preset, c.dtype) for c in cases()} == {
        (stage, preset, dtype) for stage in STAGES for preset in CHECKED for dtype in ("bf16", "fp32")
    }


@pytest.mark.parametrize(("capability", "half"), [((7, 5), "fp16"), ((8, 9), "bf16")])
def test_cases_for_a_gpu_are_in_what_it_computes(monkeypatch, capability, half) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    assert {(c.device, c.dtype) for c in cases("cuda")} == {("cuda", half), ("cuda", "fp32")}


def test_a_check_reports_what_is_off_and_what_fails(monkeypatch, capsys) -> None:
    answers = iter(
        [
            (0, 'noise\n{"predicted_gb": 1.1, "measured_gb": 1.0}'),
            (0, '{"predicted_gb": 2.0, "measured_gb": 1.0}'),
            (1, ""),
        ]
    )

    def child(*args, **kwargs):
        code, out = next(answers)
        return argparse.Namespace(returncode=code, stdout=out, stderr="Killed")

    monkeypatch.setattr("experiments.memory.run.subprocess.run", child)
    assert memory.check_all(list(cases())[:3]) == 1
    shown = capsys.readouterr().out
    assert "1.100" in shown and "failed: Killed" in shown and "1 of 3 within 15%" in shown


@pytest.mark.parametrize(
    "words, told",
    [
        (["--gb", "0"], "--gb"), (["--check", "--only", "nothing"], "--only: no case has all"),
        (["--check", "--device", "cuda"], "--device cuda"),
    ],
)  # fmt: skip
def test_wrong_input(words, told, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=told):
        memory.run(argparse.ArgumentParser(), words)
