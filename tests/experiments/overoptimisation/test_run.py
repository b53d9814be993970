"""`-t overoptimisation` on a run of tiny models: what it reads, what it writes, what it refuses."""

import json
import shutil

import numpy as np
import pytest
from every_family import EVERY
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
    write_overoptimisation,
)
from inference.answers import Machine, Sampling
from inference.best_of_n import best_of_n_kl

pytestmark = pytest.mark.slow

SMALL = ["--prompts", "12", "--best-of", "4", "--device", "cpu"]


def flags(run, *words):
    return main.Parser(), [str(run), *SMALL, "--runs-dir", str(run.parent), *words]


@pytest.fixture(scope="module")
def run(tmp_path_factory, family):
    return make_runs(tmp_path_factory.mktemp("runs"), family=family)


@pytest.fixture(scope="module")
def grader(run):
    found = PPORun.read(run)
    prompts = overoptimisation.held_out_prompts("demo", text_model(found.sft).template, 12)

    def words(prompts, texts):
        return [float(len(text.split())) for text in texts]

    return Grader(text_model(found.sft), proxy_of(found, Machine(), None), words, prompts, Sampling(1.0, 8, 0))


@pytest.mark.parametrize("family", EVERY, indirect=True, scope="session")
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


GOLD = "/elsewhere/src/utils/demo/gold.py:gold_reward"
EVALUATIONS = [
    {"step": 0, "eval/kl": 0.0, "eval/score": 0.1, "eval/gold": -0.5}, {"step": 1, "objective/kl": 7.0},
    {"step": 1, "eval/kl": -0.1, "eval/score": 0.5, "eval/gold": 1.0},
    {"step": 3, "eval/kl": 4.0, "eval/score": 1.1, "eval/gold": None},
    {"step": 6, "eval/kl": 9.0, "eval/score": 2.1, "eval/gold": -1.0},
]  # fmt: skip


def with_evaluations(run, folder, lines=EVALUATIONS, **settings):
    """A copy of the runs with figures of their own, of which all but the newest checkpoint are gone."""
    copy = shutil.copytree(run.parent, folder) / run.name
    shutil.rmtree(copy / "checkpoints")
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    hyperparams = json.loads((copy / "hyperparams.json").read_text())
    hyperparams["config"] |= settings
    (copy / "hyperparams.json").write_text(json.dumps(hyperparams))
    return copy


def test_where_no_checkpoint_was_kept_stand_the_runs_own_evaluations(run, tmp_path, capsys):
    copy = with_evaluations(run, tmp_path / "runs", eval_reward_fn=GOLD)
    assert overoptimisation.run(*flags(copy)) == 0
    found, shown = json.loads((copy / "overoptimisation.json").read_text()), capsys.readouterr().out
    assert [(row["step"], row["source"]) for row in found["ppo"]] == [(6, "checkpoint")]
    assert found["evaluations"] == [
        {"step": 1, "source": "evaluation", "kl": -0.1, "d": 0, "proxy": pytest.approx(0.4), "gold": 1.5},
        {"step": 3, "source": "evaluation", "kl": 4.0, "d": 2, "proxy": pytest.approx(1.0), "gold": None},
    ]  # fmt: skip
    assert "| PPO, step 1, by the run | -0.10 | +0.40 | +1.50 |  |" in shown
    assert "| PPO, step 3, by the run | 4.00 | +1.00 |  |  |" in shown and "| PPO, step 6 |" in shown
    assert shown.index("step 1, by") < shown.index("step 3, by") < shown.index("PPO, step 6 |") < shown.index("best of")
    assert "PPO, gold: too few different distances to fit a curve; three checkpoints are needed" in shown
    assert "highest gold reward measured: step 1, +1.50 at a KL of -0.10" in shown


def test_checkpoints_that_were_kept_say_more_than_evaluations_after_the_first(run, grader, tmp_path):
    kept = PPORun.read(run)
    whole = measure(kept, grader)
    logged = PPORun.read(with_evaluations(run, tmp_path / "runs", eval_reward_fn=GOLD))
    samples = grader.draws(2)
    figures, _ = write_overoptimisation(logged, whole, samples, "gold", grader.sampling, tmp_path)
    assert list(whole) == [2, 4, 6] and [row["step"] for row in figures["evaluations"]] == [1]


@pytest.mark.parametrize(
    ("settings", "judge", "known"),
    [
        ({"eval_reward_fn": GOLD}, "gold", True),
        ({"eval_reward_fn": "src/utils/demo_gold.py:gold_reward"}, "gold", True),  # the file's earlier name
        ({"eval_reward_fn": "mine.py:score"}, "./mine.py:score", True),
        ({"eval_reward_fn": "mine.py:score"}, "mine.py:other", False),
        ({"eval_reward_fn": "mine.py:score"}, "gold", False),
        ({"eval_reward_fn": GOLD}, "rm:rm_t", False),
        ({"eval_reward_fn": ""}, "gold", False),
        ({}, "gold", False),  # a run from before there was one
    ],
)
def test_the_gold_of_an_evaluation_counts_where_it_is_the_judges(run, tmp_path, settings, judge, known):
    rows = PPORun.read(with_evaluations(run, tmp_path / "runs", **settings)).evaluations(judge)
    assert [row["step"] for row in rows] == [1, 3, 6] and [row["proxy"] for row in rows] == pytest.approx([0.4, 1, 2])
    assert [row["gold"] for row in rows] == ([1.5, None, -0.5] if known else [None] * 3)


def test_evaluations_that_say_nothing(run, tmp_path):
    assert PPORun.read(run).evaluations("gold") == []  # no metrics.jsonl
    later = PPORun.read(with_evaluations(run, tmp_path / "later", EVALUATIONS[1:]))
    assert later.evaluations("gold") == []  # nothing of the SFT model to measure from
    torn = with_evaluations(run, tmp_path / "torn")
    (torn / "metrics.jsonl").write_text("what\n" + json.dumps(EVALUATIONS[0]) + "\n")
    with pytest.raises(UserError, match="metrics.jsonl:1: is not JSON"):
        overoptimisation.run(*flags(torn))


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
    row = {"source": "checkpoint", "kl": 4.0, "proxy": 1.0, "proxy_ci": (0.9, 1.1), "gold": 0.5, "gold_ci": (0.4, 0.6)}
    shown = report({
        "ppo": [{"step": 9, **row, "correlation": 0.31}, {"step": 10, **row, "gold": 0.2}],
        "evaluations": [],
        "best_of_n": [{"n": 1, **row}, {"n": 2, **row}],
        "fits": {"ppo": {"proxy": rising, "gold": fit}, "best_of_n": {"proxy": None, "gold": None}},
    })  # fmt: skip
    assert "| PPO, step 9 | 4.00 | +1.00 (+0.90 to +1.10) | +0.50 (+0.40 to +0.60) | 0.31 |" in shown
    assert "best of 1" not in shown and "| best of 2 |" in shown
    assert "PPO, proxy: a = 1.000, b = -0.100; no peak within what was measured" in shown
    assert "PPO, gold: a = 1.000, b = 0.300; peak at a KL of 4.0 nats (1.0 to never), +0.50" in shown
    assert "best-of-n, gold: too few different distances" in shown
    assert shown.endswith("highest gold reward measured: step 9, +0.50 at a KL of 4.00")
