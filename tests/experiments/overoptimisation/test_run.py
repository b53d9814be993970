"""`-t overoptimisation` on a run of tiny models: what it reads, what it writes, what it refuses."""

import json
import shutil

import numpy as np
import pytest
from tiny_runs import make_runs

from config.user_error import UserError
from experiments import main
from experiments.graded_answers import Grader, best_of
from experiments.overoptimisation import run as overoptimisation
from experiments.overoptimisation.run import (
    PPORun,
    measure,
    proxy_of,
    report,
    reward_function_of,
    text_model,
)
from inference.answers import Machine, Sampling
from inference.best_of_n import best_of_n_kl

pytestmark = pytest.mark.slow

SMALL = ["--prompts", "12", "--best-of", "4", "--device", "cpu"]


def flags(run, *words):
    return main.Parser(), [str(run), *SMALL, "--runs-dir", str(run.parent), *words]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def grader(run):
    found = PPORun.read(run)
    prompts = overoptimisation.held_out_prompts("demo", text_model(found.sft).template, 12)

    def words(prompts, texts):
        return [float(len(text.split())) for text in texts]

    return Grader(text_model(found.sft), proxy_of(found, Machine(), None), words, prompts, Sampling(1.0, 8, 0))


def test_from_the_command_line_to_the_picture(run, tmp_path, capsys, monkeypatch):
    where = ["--runs-dir", str(run.parent), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["main.py", "-t", "overoptimisation", "ppo_t", *SMALL, *where])
    assert main.main() == 0
    shown = capsys.readouterr().out
    assert shown.endswith(f"over-optimisation picture: {tmp_path / 'overoptimisation.png'}\n")
    assert "note: 12 prompts" in shown and "| best of 4 |" in shown and "| PPO, step 6 |" in shown
    assert (tmp_path / "overoptimisation.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads((tmp_path / "overoptimisation.json").read_text())
    assert [row["step"] for row in found["ppo"]] == [2, 4, 6]  # final/ is step 6 again
    assert [row["kl"] for row in found["best_of_n"]] == pytest.approx([best_of_n_kl(n) for n in (1, 2, 4)])
    assert (found["run"], found["judge"], found["prompts"], found["samples"]) == (run.name, "gold", 12, 4)
    assert found["ppo"][0]["kl"] == pytest.approx(0, abs=1e-4)  # the first checkpoint is the SFT model
    assert 0 < found["ppo"][1]["kl"] < found["ppo"][2]["kl"]


def test_other_judges(run, tmp_path):
    """The judge sees texts and decides the gold curve; the proxy stays the run's reward model."""
    (tmp_path / "words.py").write_text("def count(prompts, texts):\n    return [len(t.split()) for t in texts]\n")
    found = {}
    for name, judge in (("file", f"{tmp_path}/words.py:count"), ("rm", "rm:rm_t")):
        out = tmp_path / name
        assert overoptimisation.run(*flags(run, "--judge", judge, "--out", str(out))) == 0
        found[name] = json.loads((out / "overoptimisation.json").read_text())
        assert found[name]["judge"] == judge
    assert found["file"]["sft"]["proxy"] == found["rm"]["sft"]["proxy"]
    assert 0 < found["file"]["sft"]["gold"]["mean"] < 8 and found["rm"]["sft"]["gold"] != found["file"]["sft"]["gold"]


def test_runs_that_were_moved(run, tmp_path):
    moved = shutil.copytree(run.parent, tmp_path / "elsewhere")
    hyperparams = json.loads((moved / run.name / "hyperparams.json").read_text())
    for key in ("sft", "rm"):
        hyperparams[key] = hyperparams[key].replace(str(run.parent), "/gone")
    (moved / run.name / "hyperparams.json").write_text(json.dumps(hyperparams))
    found = PPORun.read(moved / run.name)
    assert found.sft == moved / "sft_t_20260101000000/final" and found.rm == moved / "rm_t_20260101000001/final"
    shutil.rmtree(found.rm)
    with pytest.raises(UserError, match="put that run back"):
        PPORun.read(moved / run.name)


def test_checkpoints_that_are_graded_already_are_not_sampled_again(run, grader, monkeypatch):
    found = PPORun.read(run)
    whole = measure(found, grader)
    asked = []
    monkeypatch.setattr(overoptimisation, "text_model", lambda folder: asked.append(folder) or text_model(folder))
    again = measure(found, grader, known={6: whole[6], 4: whole[4]})
    assert asked == [run / "checkpoints/step_00000002"] and sorted(again) == [2, 4, 6]
    assert (again[2].proxy == whole[2].proxy).all()


def test_grades_are_those_of_the_texts(grader):
    """Against sampling by hand: KL 0 of the model itself, greedy without KL, draws that differ."""
    own = grader.grade(grader.sft, "x")
    assert (own.kl == 0).all() and (own.tokens <= 8).all() and own.proxy.std() > 0
    assert grader.grade(grader.sft, "x", greedy=True).kl is None
    first, second = grader.draws(2)
    assert (first.proxy != second.proxy).any()
    chosen = best_of([first, second])
    assert (chosen.proxy == np.maximum(first.proxy, second.proxy)).all()
    assert (chosen.gold == np.where(second.proxy > first.proxy, second.gold, first.gold)).all()


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("with_rm", [True, False])
def test_the_proxy_is_what_ppo_maximised(run, grader, tmp_path, weight, with_rm):
    (tmp_path / "words.py").write_text("def count(prompts, texts):\n    return [len(t.split()) for t in texts]\n")
    plain = PPORun.read(run)
    spec = f"{tmp_path}/words.py:count"
    config = plain.config | {"reward_fn": "as recorded", "reward_fn_weight": weight}
    both = PPORun(run, config, plain.sft, plain.rm if with_rm else None)
    counts = weight or not with_rm
    function = reward_function_of(both, spec if counts else "")
    sample = Grader(grader.sft, proxy_of(both, Machine(), function), grader.gold, grader.prompts, grader.sampling)
    expected = grader.grade(grader.sft, "x").proxy * with_rm
    words = sample.grade(sample.sft, "x").gold
    assert sample.grade(sample.sft, "x").proxy == pytest.approx(expected + (weight if with_rm else 1.0) * words)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--judge", "nobody"], "--judge nobody: there are gold"),
        (["--judge", "rm:nothing"], "--judge nothing: no such run"),
        (["--judge", "rm:sft_t"], "--judge rm:sft_t: holds an SFT model; give a run of train_rm.py"),
        (["--judge", "no.py:f"], "--judge no.py:f"),
        (["--best-of", "1"], "must be at least 2"),
        (["--out", "/dev/null/x"], "--out /dev/null/x: cannot write there"),
    ],
)
def test_wrong_flags(run, words, complaint):
    with pytest.raises(UserError, match=complaint):
        overoptimisation.run(*flags(run, *words))


def test_wrong_runs(run, tmp_path):
    empty = make_runs(tmp_path / "empty", steps=())
    with pytest.raises(UserError, match="saved no checkpoint yet"):
        overoptimisation.run(*flags(empty))
    other = make_runs(tmp_path / "other", steps=(2,), dataset="hh")
    with pytest.raises(UserError, match="hh has no gold reward"):
        overoptimisation.run(*flags(other))
    (other / "hyperparams.json").write_text('{"stage": "sft"}')
    with pytest.raises(UserError, match="run of stage sft; give a run of train_ppo.py"):
        overoptimisation.run(*flags(other))
    (other / "hyperparams.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        overoptimisation.run(*flags(other))


def test_a_reward_function_is_the_one_that_the_user_names(run, tmp_path):
    """What the run recorded is shown and not imported; a flag without need is told."""
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(
        f"open({str(marker)!r}, 'w')\ndef f(prompts, texts):\n    return [0.0] * len(texts)\n"
    )
    recorded = f"{tmp_path}/evil.py:f\x1b[2J"
    theirs = make_runs(
        tmp_path / "theirs", steps=(2,), reward_fn=recorded, reward_fn_weight=0.5, eval_reward_fn=recorded
    )
    with pytest.raises(UserError) as error:
        overoptimisation.run(*flags(theirs))
    told = str(error.value)
    assert told.startswith("--reward-fn: ") and repr(recorded) in told and "\x1b" not in told and not marker.exists()
    assert told.endswith(f"main.py -t overoptimisation {theirs} --reward-fn FILE.py:FUNCTION")
    with pytest.raises(UserError, match="trained without one; leave it out"):
        overoptimisation.run(*flags(run, "--reward-fn", f"{tmp_path}/evil.py:f"))
    assert not marker.exists()
    hub = make_runs(tmp_path / "hub", steps=(2,), dataset="hh", eval_reward_fn=recorded)
    with pytest.raises(
        UserError, match=r"--judge: hh has no gold reward \(the run recorded --eval-reward-fn '.*evil.py:f"
    ):
        overoptimisation.run(*flags(hub))
    assert not marker.exists()
    (tmp_path / "mine.py").write_text("def f(prompts, texts):\n    return [1.0] * len(texts)\n")
    words = ["--reward-fn", f"{tmp_path}/mine.py:f", "--out", str(tmp_path / "out")]
    assert overoptimisation.run(*flags(theirs, *words)) == 0 and not marker.exists()


def test_held_out_prompts_are_different_and_of_the_test_split(grader):
    template = grader.sft.template
    prompts = overoptimisation.held_out_prompts("demo", template, 50)
    assert len(set(prompts)) == 50 and prompts[:12] == list(grader.prompts)
    assert len(overoptimisation.held_out_prompts("demo", template, 10**6)) < 1000


def test_peaks_are_told():
    fit = {"a": 1.0, "b": 0.3, "peak_within_data": True, "peak_d": 2.0, "peak_d_ci": [1.0, None], "peak_reward": 0.5}
    rising = {"a": 1.0, "b": -0.1, "peak_within_data": False}
    row = {"kl": 4.0, "proxy": 1.0, "proxy_ci": (0.9, 1.1), "gold": 0.5, "gold_ci": (0.4, 0.6)}
    shown = report({
        "ppo": [{"step": 9, **row, "correlation": 0.31}, {"step": 10, **row, "gold": 0.2}],
        "best_of_n": [{"n": 1, **row}, {"n": 2, **row}],
        "fits": {"ppo": {"proxy": rising, "gold": fit}, "best_of_n": {"proxy": None, "gold": None}},
    })  # fmt: skip
    assert "| PPO, step 9 | 4.00 | +1.00 (+0.90 to +1.10) | +0.50 (+0.40 to +0.60) | 0.31 |" in shown
    assert "best of 1" not in shown and "| best of 2 |" in shown
    assert "PPO, proxy: a = 1.000, b = -0.100; no peak within what was measured" in shown
    assert "PPO, gold: a = 1.000, b = 0.300; peak at a KL of 4.0 nats (1.0 to never), +0.50" in shown
    assert "best-of-n, gold: too few different distances" in shown
    assert shown.endswith("highest gold reward measured: step 9, +0.50 at a KL of 4.00")
