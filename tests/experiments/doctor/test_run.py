"""The doctor on runs that were really broken, and on healthy ones; its text, its pictures, its exit codes."""

import json
import re
import shutil
import sys
from inspect import get_annotations
from pathlib import Path

import broken_runs
import numpy as np
import pytest
from matplotlib.figure import Figure

from config.user_error import UserError, run_main
from experiments import main as script
from experiments.doctor import checks, table
from experiments.doctor import run as doctor
from experiments.doctor.picture import _draw, draw_finding
from experiments.doctor.record import Series, read_run
from experiments.doctor.run import examine
from experiments.doctor.table import RULES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
PACKED = Path(__file__).parent / "runs"
NAMES = [path.name.removesuffix(".tar.gz") for path in sorted(PACKED.glob("*.tar.gz"))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every packed run by its stem."""
    folders = broken_runs.unpack(PACKED, tmp_path_factory.mktemp("runs"))
    return {folder.name[:-15]: folder for folder in folders}


def visit(*words):
    """`main.py -t doctor ...` in this process; returns the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main.py", "-t", "doctor", *map(str, words)])
        return script.main()


def test_every_fault_and_three_seeds_of_health_are_there():
    assert {case.stem for case in broken_runs.CASES} <= set(NAMES)
    stems = (
        "sft_vanilla_demo_s{}",
        "sft_demo_s{}",
        "rm_demo_s{}",
        "ppo_demo_s{}",
        "ppo_demo_s{}_lora",
        "ppo_demo_s{}_kl0",
    )
    assert {stem.format(seed) for stem in stems for seed in range(3)} <= set(NAMES)
    assert all(path.stat().st_size < 60_000 for path in PACKED.iterdir())


# With 30 times the learning rate a reward model may lose its accuracy or jump away altogether: it is the seed's choice.
ALSO = {"rm_doctor_lr30_s2": {"diverges"}}


@pytest.mark.parametrize("name", NAMES)
def test_each_fault_is_found_first_and_health_is_left_in_peace(runs, name):
    _, expected = broken_runs.fault_of(runs[name])
    found = [finding.code for finding in examine(read_run(runs[name]))[0]]
    assert set(found[:1]) <= ALSO.get(name, {expected}) and bool(found) == bool(expected), found


FIRST_CAUSES = {
    "sft_doctor_no_eos": "the EOS is no target of the loss",
    "sft_doctor_lr30": "the learning rate is 30 times the default",
    "rm_doctor_shuffled": "chosen and rejected are mixed up in the data",
    "rm_doctor_lr30": "the learning rate is 42.9 times the default",  # 30 times that of the recipe it was recorded with
    "ppo_doctor_dropout": "dropout is on",
    "ppo_doctor_shuffled": "the reward it climbs says nothing: the reward model is no better than chance",
    "ppo_doctor_no_eos": "the SFT model never learned to end: EOS masked",
    "ppo_doctor_lr30": "the learning rate is 30 times the default",
    **{
        f"ppo_demo_s{seed}_kl0": "nothing holds the policy near the SFT model: the KL coefficient is 0"
        for seed in range(3)
    },
}


def test_the_right_cause_is_named_first(runs):
    broken = {name: re.sub(r"(_doctor_.+)_s\d+$", r"\1", name) for name in NAMES if broken_runs.fault_of(runs[name])[1]}
    assert set(broken.values()) == set(FIRST_CAUSES)
    for name, case in broken.items():
        assert examine(read_run(runs[name]))[0][0].causes[0].why.startswith(FIRST_CAUSES[case]), name


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_still_going_gets_no_false_alarm(runs, name):
    """Of a healthy run no beginning has a finding; of a broken one, only its whole has to."""
    record = read_run(runs[name])
    if broken_runs.fault_of(runs[name])[1]:
        return
    steps = sorted({int(step) for series in record.series.values() for step in series.steps})
    for step in steps:
        assert examine(record.up_to(step))[0] == [], step


def test_a_missing_penalty_is_found_without_a_gold_reward(runs):
    for seed in range(3):
        record = read_run(runs[f"ppo_demo_s{seed}_kl0"])
        del record.series["eval/gold"]
        findings, unclear = examine(record)
        assert findings[0].code == "kl-without-score" and findings[0].causes[0].change == "--kl-coef 0.08"
        assert [u.code for u in unclear] == ["over-optimised"]


def test_dropout_shows_where_the_loop_would_have_stopped(runs):
    findings, _ = examine(read_run(runs["ppo_doctor_dropout"]))
    assert [f.code for f in findings[:3]] == ["ratio-not-one", "kl-not-zero-at-start", "sampler-differs"]
    assert all(f.step == 1 for f in findings[:3])
    assert re.search(r"in 6 of 6 iterations.*sampler's log-probabilities are off by up to \d", findings[0].notes[0])


def test_the_reward_model_of_a_ppo_run_is_asked(runs, tmp_path):
    findings, _ = examine(read_run(runs["ppo_doctor_shuffled"]))
    assert findings[0].of.folder.name == runs["rm_doctor_shuffled"].name
    alone = shutil.copytree(runs["ppo_doctor_shuffled"], tmp_path / "alone" / runs["ppo_doctor_shuffled"].name)
    _, unclear = examine(read_run(alone))
    assert "reward-at-chance" in {item.code for item in unclear}


def test_a_visit_with_findings(runs, capsys):
    folder = runs["ppo_demo_s0_kl0"]
    stale = folder / "doctor" / "old.png"
    stale.parent.mkdir()
    stale.write_bytes(b"")
    assert visit("ppo_demo_s0_kl0", "--runs-dir", folder.parent) == 3
    told = capsys.readouterr().out
    assert told.startswith(f"{folder}: PPO, 30 of 30 iterations, finished\n")
    assert "1. over-optimised: the gold reward falls" in told and "2. kl-without-score" in told
    assert "eval/gold is 0.8922 at step 20; healthy: 1.709 or more" in told
    assert "the KL coefficient is 0 -> --kl-coef 0.08" in told
    pictures = [Path(words) for words in re.findall(r"^ +picture +(.+)$", told, re.M)]
    assert sorted(pictures) == sorted((folder / "doctor").iterdir()) and len(pictures) >= 2
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_a_healthy_visit_writes_nothing(runs, capsys):
    folder = runs["ppo_demo_s1"]
    before = sorted(folder.iterdir())
    assert visit(folder) == 0
    assert capsys.readouterr().out.endswith("\n\nno findings\n") and sorted(folder.iterdir()) == before


def test_a_short_run_is_told_what_is_missing(runs, tmp_path, capsys):
    folder = shutil.copytree(runs["ppo_demo_s0"], tmp_path / "ppo_demo_s0_20260101000000")
    (folder / "final").rmdir()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:5]) + lines[5][:100])
    assert visit(folder) == 0
    told = capsys.readouterr().out
    assert "4 of 30 iterations, not finished" in told and "cannot be judged here, for want of:" in told
    assert "kl-without-score        15 iterations" in told and told.endswith("no findings in what can be judged\n")


def test_pictures_may_go_elsewhere(runs, tmp_path, capsys):
    elsewhere = tmp_path / "pictures"
    elsewhere.mkdir()
    (elsewhere / "mine.png").write_bytes(b"")
    assert visit(runs["sft_doctor_no_eos"], "--pictures", elsewhere) == 3
    assert {"mine.png", "never-ends.png"} <= {path.name for path in elsewhere.iterdir()}
    assert not (runs["sft_doctor_no_eos"] / "doctor").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--pictures .*cannot write there"):
        visit(runs["sft_doctor_no_eos"], "--pictures", tmp_path / "file")


@pytest.mark.parametrize(("words", "complaint"), [(["nope"], "RUN nope: no such run"), ([], "required: RUN")])
def test_bad_input_is_exit_code_2(words, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["main.py", "-t", "doctor", *words, "--runs-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        run_main(script.main)
    told = capsys.readouterr()
    assert stop.value.code == 2 and told.out == "" and complaint in told.err and told.err.count("\n") == 1


def test_a_picture_of_every_kind(runs, tmp_path):
    """One panel and three, a range open on either side, a value that is not a number, a log axis."""
    for name, code in (("lr30", "steps-too-large"), ("dropout", "ratio-not-one"), ("dropout", "kl-negative")):
        record = read_run(runs[f"ppo_doctor_{name}"])
        finding = next(f for f in examine(record)[0] if f.code == code)
        draw_finding(record, finding, tmp_path / f"{code}.png")
    record = read_run(runs["ppo_demo_s0"])
    record.series["loss/policy"].values[:] = float("nan")
    (finding,) = examine(record)[0]
    assert finding.code == "not-a-number" and finding.step == 1
    draw_finding(record, finding, tmp_path / "not-a-number.png")
    assert all(path.stat().st_size > 5_000 for path in tmp_path.iterdir())


@pytest.mark.parametrize(("tag", "scale"), [("eval/score", "linear"), ("eval/gold", "linear"), ("objective/kl", "log")])
def test_a_score_that_starts_near_0_is_drawn_on_a_plain_axis(tag, scale):
    axis = Figure().subplots()
    _draw(axis, Series(np.arange(3), np.array([0.003, 1.2, 1.7])), tag, "black")
    assert axis.get_yscale() == scale


def test_healthy_ranges_in_words(runs):
    texts = {f.code: doctor.healthy(f) for f in examine(read_run(runs["ppo_doctor_dropout"]))[0]}
    assert texts["ratio-not-one"] == "0 to 1e-10" and texts["steps-too-large"] == "0.03 or less"
    assert texts["kl-negative"] == "-0.5 or more"


def test_the_table_of_the_docs_is_the_one_that_the_command_prints(runs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["broken_runs.py", "--table", str(PACKED)])
    assert broken_runs.main() == 0
    assert capsys.readouterr().out.strip() in (ROOT / "docs/doctor.md").read_text()


def test_the_docs_explain_every_finding():
    text = (ROOT / "docs/doctor.md").read_text()
    codes = {rule.code for rules in RULES.values() for rule in rules}
    assert len(codes) > 20 and set(re.findall(r"^\| `([a-z-]+)` \|", text, re.M)) == codes


def test_every_rule_of_the_table_is_in_use():
    """A row that is written down and left out of its stage would never be asked."""
    written = [value for value in vars(table).values() if isinstance(value, table.Rule)]
    assert len(written) > 3 and all(any(rule in rules for rules in RULES.values()) for rule in written)
    used = {rule.check for rules in RULES.values() for rule in rules}
    own = [check for check in vars(checks).values() if getattr(check, "__module__", "") == checks.__name__]
    returns = "Finding | None", "Finding | str | None"
    judging = [check for check in own if get_annotations(check).get("return") in returns]
    assert len(judging) > 10 and set(judging) <= used


def test_every_cause_says_what_to_change():
    for rules in RULES.values():
        for rule in rules:
            by_case = rule.causes if isinstance(rule.causes, dict) else {"": rule.causes}
            assert by_case and all(by_case.values())
            for causes in by_case.values():
                assert all(text.count(" -> ") == 1 for text in causes if isinstance(text, str)), rule.code


def test_packing_takes_paths_out_and_keeps_what_is_read(runs, tmp_path):
    source = runs["rm_doctor_lr30"]
    run = shutil.copytree(source, tmp_path / "here" / source.name)
    hyperparams = json.loads((run / "hyperparams.json").read_text())
    hyperparams["sft"] = "/home/somebody/runs/sft_demo_s0_20260101000000/final"
    hyperparams["config"]["runs_dir"] = hyperparams["command"][-1] = "/home/somebody/runs"
    hyperparams["command"][-2] = "--runs-dir"
    hyperparams["config"]["dataset"] = "/home/somebody/mine.jsonl"
    (run / "hyperparams.json").write_text(json.dumps(hyperparams))
    for target in ("a", "b"):
        broken_runs.pack(run, tmp_path / target / "x.tar.gz")
    assert (tmp_path / "a/x.tar.gz").read_bytes() == (tmp_path / "b/x.tar.gz").read_bytes()
    (back,) = broken_runs.unpack(tmp_path / "a", tmp_path / "out")
    told = (back / "hyperparams.json").read_text()
    assert "somebody" not in told and json.loads(told)["sft"] == "runs/sft_demo_s0_20260101000000/final"
    assert json.loads(told)["command"][-1] == "runs"
    assert (back / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert examine(read_run(back)) == examine(read_run(run))


def test_packed_runs_name_no_machine(runs):
    for folder in runs.values():
        for path in folder.glob("*.json*"):
            assert not re.search(r'"/(?!\d)|"machine"', path.read_text()), path


TINY = "--dataset {gold} --max-steps 2 --eval-every 2 --log-every 1 --eval-examples 4 -b 2 --global-batch-size 4"


def test_a_fault_put_into_the_real_scripts_is_found_in_what_they_write(tmp_path, monkeypatch, capsys):
    """Three tiny stages, then PPO twice: as it is, and with dropout on and its assertions off."""
    monkeypatch.setenv("RLHF_CACHE_DIR", str(tmp_path / "tokens"))
    data = tmp_path / "pairs.jsonl"
    with data.open("w") as file:
        for i in range(80):
            asked = f"\n\nHuman: What is {i}?\n\nAssistant:"
            file.write(json.dumps({"chosen": asked + f" {i}.", "rejected": asked + " No idea."}) + "\n")
    monkeypatch.setattr(broken_runs, "GOLD", str(data))  # {gold} is the one word of a case that a test can choose
    response = " --response-length 8"
    ppo = TINY + response + " -a sft_doctor_tiny -c rm_doctor_tiny"
    cases = [
        broken_runs.Case("tiny", "sft", "none", TINY + " -p scratch --sample-tokens 8"),
        broken_runs.Case("tiny", "rm", "none", TINY + response + " -p sft_doctor_tiny --normalise-prompts 8"),
        broken_runs.Case("tiny", "ppo", "none", ppo),
        broken_runs.Case("tiny_dropout", "ppo", "dropout on", ppo, "ratio-not-one", broken_runs.dropout_on),
    ]
    runs = [broken_runs.train(case, "", 0, str(tmp_path)) for case in cases]
    assert broken_runs.train(cases[0], "", 0, str(tmp_path)) == runs[0]  # a finished run is used again
    capsys.readouterr()
    codes = [{finding.code for finding in examine(read_run(run))[0]} for run in runs]
    rests_on = {"ratio-not-one", "kl-not-zero-at-start", "sampler-differs"}
    assert not codes[2] & rests_on and codes[3] >= rests_on
    assert visit(runs[3]) == 3 and "1. ratio-not-one" in capsys.readouterr().out
    record = read_run(runs[2])
    assert record.planned_steps == 2 and record.finished and record.reward.folder == runs[1]
    assert read_run(runs[0]).planned_steps == 2


def test_the_masked_eos_is_the_only_target_that_goes():
    import torch

    from training import trainers
    from utils.data.batching import Batch

    ids = torch.arange(14).view(2, 7)
    batch = Batch(ids, ids >= 0, torch.tensor([2, 3]), torch.tensor([5, 7]))
    whole = trainers.sft_targets(batch).tolist()
    with broken_runs.eos_masked():
        masked = trainers.sft_targets(batch).tolist()
    assert whole == [1, 2, 3, 9, 10, 11, 12] and masked == [1, 2, 9, 10, 11]
