"""The checkpoint that a run was started from: known by its weights, wherever its folder is now."""

import shutil
from pathlib import Path

import pytest

from config.user_error import UserError
from utils.runs.origins import find_origin, places_of, record_origins, without_folders

SFT, OTHER, PPO = "sft_a_20260101000000", "sft_a_20260102000000", "ppo_a_20260103000000"
INSIDE = ("final", "best", "checkpoints/step_00000004")


def checkpoint(folder: Path, weights: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text("{}")
    (folder / "model.safetensors").write_text(weights)
    return folder


@pytest.fixture
def runs(tmp_path) -> Path:
    """Two SFT runs of one name and a PPO run, in "old"."""
    for inside in INSIDE:
        for run in (SFT, OTHER):
            checkpoint(tmp_path / "old" / run / inside, f"{run} {inside}")
    (tmp_path / "old" / PPO).mkdir()
    return tmp_path / "old"


def find(record: dict, run: Path, runs_dir: str = "nowhere", argument: str = "") -> Path | None:
    return find_origin(record, "sft", run, runs_dir, f"--resume {run}", argument)


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("digest", [True, False])
def test_it_is_found_where_it_was_beside_the_run_and_in_runs_dir(runs, tmp_path, inside: str, digest: bool) -> None:
    record = record_origins(sft=runs / SFT / inside)
    if not digest:
        del record["weights"]  # as older code left it
    assert find(record, runs / PPO) == runs / SFT / inside
    moved = runs.rename(tmp_path / "new")
    assert find(record, moved / PPO) == moved / SFT / inside
    run = Path(shutil.move(moved / PPO, tmp_path / "alone"))
    assert find(record, run, str(moved)) == moved / SFT / inside
    with pytest.raises(UserError) as told:
        find(record, run, "elsewhere", "sft_a")
    assert f"--resume {run}: was started from the SFT model {runs / SFT / inside}, which is neither" in str(told.value)
    assert "give the folder it is in as --runs-dir" in str(told.value)
    assert find(record, run, "elsewhere", str(moved / SFT / inside)) == moved / SFT / inside  # what the flag means


@pytest.mark.parametrize("inside", INSIDE)
def test_a_newer_run_of_the_name_is_never_taken_for_it(runs, inside: str) -> None:
    records = record_origins(sft=runs / SFT / inside), {"sft": str(runs / SFT / inside)}
    for record in records:
        assert find(record, runs / PPO, str(runs), "sft_a") == runs / SFT / inside
    shutil.rmtree(runs / SFT)
    for record in records:
        with pytest.raises(UserError, match="neither there nor beside the run"):
            find(record, runs / PPO, str(runs), "sft_a")


@pytest.mark.parametrize("inside", INSIDE)
def test_a_run_that_was_trained_on_in_its_place(runs, inside: str) -> None:
    """The weights of then are taken where they were set aside; else nothing is, and one line says so."""
    folder = runs / SFT / inside
    record = record_origins(sft=folder)
    aside = folder.rename(folder.with_name(folder.name + ".superseded1"))
    checkpoint(folder, "trained on")
    assert find(record, runs / PPO) == aside
    shutil.rmtree(aside)
    with pytest.raises(UserError, match=f"{folder} has other weights now: it was trained on or replaced; put the old"):
        find(record, runs / PPO)


def test_a_checkpoint_outside_all_runs_is_found_through_its_flag(runs, tmp_path) -> None:
    folder = checkpoint(tmp_path / "models" / "mine", "some")
    record = record_origins(sft=folder)
    moved = folder.rename(tmp_path / "mine [1]")
    with pytest.raises(UserError, match="neither there"):
        find(record, runs / PPO, "nowhere", str(folder))
    assert find(record, runs / PPO, "nowhere", str(moved)) == moved


def test_none_is_recorded_as_none(runs) -> None:
    record = record_origins(sft=runs / SFT / "final", rm=None)
    assert record["rm"] == "" and list(record["weights"]) == ["sft"]
    assert find_origin(record, "rm", runs / PPO, "runs", "") is None
    assert find_origin({}, "sft", runs / PPO, "runs", "") is None


def test_names_without_the_folders_around_them(runs) -> None:
    for inside in ("", *INSIDE):
        assert without_folders(f"/a/b/{SFT}/{inside}") == str(Path(SFT, inside))
    assert without_folders("/a/b/rows.jsonl") == "rows.jsonl" and without_folders("sft_a") == "sft_a"
    there = [runs / SFT / "best", Path("x").resolve() / SFT / "best"]
    assert places_of(f"/gone/{SFT}/best", runs / PPO, "x")[1:] == there
