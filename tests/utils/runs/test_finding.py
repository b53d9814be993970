"""Finding runs: what a path, or a name without its time, means on a command line."""

import os
from pathlib import Path

import pytest

from config.user_error import UserError
from experiments.doctor.record import find_run
from utils.runs import finding
from utils.runs import folder as run_folder
from utils.runs.finding import find_checkpoint, newest_run, runs_named, step_checkpoints


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text("{}")
    return folder


def test_runs_are_found_by_their_whole_name(tmp_path) -> None:
    names = [
        "sft_demo_20260101000000", "sft_demo_20260203040506", "sft_demo_lora_20270101000000", "sft_demo_2026",
        "rm_demo_20280101000000", "sft_demoX20270101000000", "sft_d[e]mo_20270101000000",
    ]  # fmt: skip
    for name in names:
        (tmp_path / name).mkdir()
    assert [p.name for p in runs_named("sft_demo", str(tmp_path))] == [names[1], names[0]]
    assert newest_run("sft_demo", str(tmp_path)).name == names[1]
    assert newest_run("sft_d[e]mo", str(tmp_path)).name == names[-1]
    assert newest_run("sft", str(tmp_path)) is None and newest_run("sft_demo", str(tmp_path / "none")) is None


def test_a_run_means_its_final_else_best_else_newest_step(tmp_path) -> None:
    run = tmp_path / "sft_demo_20260101000000"
    step5, step30 = (checkpoint(run / "checkpoints" / f"step_{n:08d}") for n in (5, 30))
    (run / "checkpoints" / "step_00000040.writing").mkdir()
    assert step_checkpoints(run) == [step5, step30]

    def found(argument) -> Path:
        return find_checkpoint(str(argument), str(tmp_path), "-p")

    assert found(run) == step30 == found("sft_demo")
    best = checkpoint(run / "best")
    assert found("sft_demo") == best
    final = checkpoint(run / "final")
    assert found("sft_demo") == final == found(run) == found(run.name) == found(f"{run.name}/final")
    assert found(step5) == step5
    checkpoint(tmp_path / "sft_demo_20260101000001" / "final")
    assert found("sft_demo").parent.name == "sft_demo_20260101000001"


def test_the_working_directory_is_a_folder_like_others(tmp_path, monkeypatch) -> None:
    final = checkpoint(tmp_path / "sft_demo_20260101000000" / "final")
    for inside, arguments in ((final.parent, (".", "./", "final/..")), (final, (".", ".."))):
        monkeypatch.chdir(inside)
        for argument in arguments:
            assert find_checkpoint(argument, "nowhere", "-m") == final.resolve()


@pytest.mark.parametrize(
    ("argument", "told"), [("/", "-m /: no "), ("~nobody-here/run", "~nobody-here/run: there is no such user's home")]
)
def test_a_place_without_a_run_is_told_in_one_line(argument, told, tmp_path) -> None:
    with pytest.raises(UserError, match=f"^{told}"):
        find_checkpoint(argument, str(tmp_path), "-m")


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    final = checkpoint(tmp_path / "runs" / "sft_demo_20260101000000" / "final").resolve()
    assert find_checkpoint("~/runs/sft_demo_20260101000000", "nowhere", "-m") == final
    assert find_checkpoint("sft_demo", "~/runs", "-m") == final


def test_paths_count_from_the_working_directory_and_from_the_repo(tmp_path, monkeypatch) -> None:
    checkpoint(tmp_path / "a" / "final")
    monkeypatch.chdir(tmp_path)
    found = find_checkpoint("a", "runs", "-p")
    assert found == (tmp_path / "a" / "final").resolve() and found.is_absolute()
    for module in (finding, run_folder):
        monkeypatch.setattr(module, "REPO", tmp_path)
    os.makedirs("src")
    monkeypatch.chdir(tmp_path / "src")
    assert find_checkpoint("a", "runs", "-p") == found


def test_errors_name_the_flag_and_what_there_is(tmp_path) -> None:
    with pytest.raises(
        UserError,
        match=r"^-a sft_demo: no such run or folder; runs in .*: none yet; src.*_sft.py -n demo makes one$",
    ):
        find_checkpoint("sft_demo", str(tmp_path), "-a")
    for name in ("sft_a_20260101000000", "rm_b_20260101000000", "rm_b_20260101000001", "notes_x"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"^-a sft_demo: no such run or folder; runs in .*: rm_b, sft_a; src.*$"):
        find_checkpoint("sft_demo", str(tmp_path), "-a")
    with pytest.raises(UserError, match=r"^-c rm_b: no checkpoint in .*rm_b_20260101000001;"):
        find_checkpoint("rm_b", str(tmp_path), "-c")


# Runs that there are (+ has a checkpoint, ~ has figures alone), what is asked for, what is found, and how many others
# the line on stderr counts; None: no line.
NAMES = [
    ("sft_demo_s0+", "sft_demo", "sft_demo_s0", 0),
    ("sft_demo_s0+ sft_demo_s1+ sft_demo_s2~", "sft_demo", "sft_demo_s1", 2),  # the newest with a checkpoint
    ("sft_demo_s1+ sft_demo_s0+", "sft_demo", "sft_demo_s0", 1),  # by time, not by name
    ("sft_demo+ sft_demo_s0+", "sft_demo", "sft_demo", None),  # just that name comes first, however old
    ("sft_demo~ sft_demo_s0+", "sft_demo", "no checkpoint in", None),  # and its owner is told that it is empty
    ("sft_demo_s0~ sft_demo_s1~", "sft_demo", "no checkpoint in .*sft_demo_s1", None),
    ("sft_demo_s0+", "sft_demo_s", "no such run", None),  # a name ends where a _ stands
    ("sft_demo_s0+", "sft_demo_", "no such run", None),
    ("sft_demo_s0+", "sft", "no such run", None),  # a stage alone is no name
    ("sft_demo_s0+", "demo", "no such run", None),
    ("sft_demo_s0+", "ppo_demo", "no such run.*train_ppo.py -n demo makes one", None),
    ("sft_demo_s0+ rm_demo_s0+", "rm_demo", "rm_demo_s0", 0),
    ("sft_demo_s0+", "./sft_demo", "no such run or folder; runs in [^;]*$", None),  # a path is a path
    ("sft_demo_s0_kl0+ sft_demo_s0+", "sft_demo_s0", "sft_demo_s0", None),
    ("sft_d[e]mo_s0+ sft_demo_s0+", "sft_d[e]mo", "sft_d[e]mo_s0", 0),
]


@pytest.fixture
def make(tmp_path):
    """`make("sft_a+ rm_b~")`: runs, each newer than the one before."""

    def make_runs(runs: str) -> str:
        for second, run in enumerate(runs.split()):
            folder = tmp_path / f"{run[:-1]}_2026010100000{second}"
            (checkpoint(folder / "final") if run.endswith("+") else folder.mkdir())
            (folder / "metrics.jsonl").write_text("{}\n")
        return str(tmp_path)

    return make_runs


@pytest.fixture(autouse=True)
def nothing_was_told() -> None:
    finding._tell.cache_clear()


def name_of(run: Path) -> str:
    return run.name.rpartition("_")[0]


@pytest.mark.parametrize(("runs", "asked", "expected", "others"), NAMES)
def test_what_a_name_finds(make, runs, asked, expected, others, capsys) -> None:
    root = make(runs)
    if expected.startswith("no "):
        with pytest.raises(UserError, match=expected):
            find_checkpoint(asked, root, "-a")
        assert capsys.readouterr().err == ""
        return
    for _ in range(2):  # the second time nothing is told
        found = find_checkpoint(asked, root, "-a").parent
        assert name_of(found) == expected
    told = capsys.readouterr()
    more = "" if not others else f"; {others} other run{'s begin' if others > 1 else ' begins'} with {asked}_"
    assert (told.out, told.err) == ("", "" if others is None else f"-a {asked}: taking {found.name}{more}\n")


def test_a_folder_comes_before_a_name(make, tmp_path, monkeypatch, capsys) -> None:
    root = make("sft_demo_s0+")
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "sft_demo")
    assert find_checkpoint("sft_demo", root, "-a") == tmp_path / "sft_demo" and capsys.readouterr().err == ""


def test_the_doctor_takes_the_newest_run_with_figures(make, tmp_path, capsys) -> None:
    root = make("ppo_demo_s0+ ppo_demo_s1~ ppo_demo_s2~")
    newest = newest_run("ppo_demo_s2", root)
    (newest / "metrics.jsonl").unlink()
    assert name_of(find_run("ppo_demo", root)) == "ppo_demo_s1"
    assert "RUN ppo_demo: taking ppo_demo_s1_" in capsys.readouterr().err
    with pytest.raises(UserError, match="RUN ppo_dem: no such run"):
        find_run("ppo_dem", root)
