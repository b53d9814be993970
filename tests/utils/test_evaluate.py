"""The whole evaluation from the command line: tiny checkpoints, the gold judge, and a judge behind real HTTP."""

import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from every_family import EVERY
from judge_server import judge_server

from config.user_error import run_main
from inference.answers import Machine, score_texts
from inference.systems import System, load_reward_model
from utils import evaluate
from utils.evaluation.flags import parse_flags
from utils.judging import judges
from utils.runs.folder import REPO

pytestmark = pytest.mark.slow

TIME = "20260101000000"
PROMPTS = ["What is tea?", "How many legs does a crab have?", "Hi!", "What colour is grass?", "Why?"]


@pytest.fixture
def runs(tiny_runs, tmp_path):
    """Runs of all stages, and nothing kept from another evaluation."""
    folder = tmp_path / "runs"
    folder.mkdir()
    for run in tiny_runs.iterdir():
        (folder / run.name).symlink_to(run)
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture
def call(runs, capsys, monkeypatch):
    """`call("-s sft_t", ...)`: exit code, stdout and stderr; the standard flags are put in."""
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False))

    def run(*words: str):
        argv = [w for text in (*words, "--device cpu") for w in text.split()] + ["--runs-dir", str(runs)]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_main(lambda: evaluate.main(argv))
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A judge behind HTTP whose client does not wait long."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-0123456789")
    monkeypatch.chdir(tmp_path)
    options = functools.partial(judges.JudgeOptions, first_wait=0.01, max_attempts=2, key_folders=())
    monkeypatch.setattr(evaluate, "JudgeOptions", options)
    with judge_server() as running:
        yield running


def newest(runs):
    return max(runs.glob("eval_*"), key=lambda folder: (folder / "hyperparams.json").stat().st_mtime_ns)


def result(runs) -> dict:
    return json.loads((newest(runs) / "evaluation.json").read_text())


def error(outcome) -> str:
    code, _, err = outcome
    lines = err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), outcome
    return lines[0]


THREE = "-s sft_t -p ppo_t -v sft_vanilla_t"


@pytest.mark.parametrize("family", EVERY, indirect=True, scope="session")
def test_the_gold_judge_on_all_kinds_of_systems(call, runs, tmp_path):
    rows = "".join(json.dumps({"prompt": p, "response": "Tea is a drink."}) + "\n" for p in PROMPTS)
    (tmp_path / "made.jsonl").write_text(rows)
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    code, out, _ = call(
        THREE, "--best-of 2,3 --judge gold -n all", f"--prompts {tmp_path}/p.txt --system made={tmp_path}/made.jsonl"
    )
    assert code == 0 and "pairs of systems: 15, questions: 150" in out and "trained with" in out
    assert "answers: temperature 0.9, at most 6 tokens, seed 0" in out
    (folder,) = runs.glob("eval_all_*")
    assert sorted(p.name for p in folder.iterdir() if p.name != ".lock") == [
        "answers", "evaluation.json", "evaluation.md", "evaluation.png", "hyperparams.json",
    ]  # fmt: skip
    data = result(runs)
    names = ["vanilla", "sft", "best_of_2", "best_of_3", "ppo", "made"]
    assert list(data["systems"]) == names == [p for p in names if (folder / "answers" / f"{p}.jsonl").is_file()]
    pairs = [(pair["a"], pair["b"]) for pair in data["pairs"]]
    assert pairs[:3] == [("sft", "vanilla"), ("best_of_2", "vanilla"), ("best_of_2", "sft")] and len(pairs) == 15
    for pair in data["pairs"]:
        assert pair["n"] == 5 and pair["decisive_wins"] + pair["decisive_losses"] + pair["ties"] == 5
        assert pair["first_position_rate"] in (0.5, None) and pair["inconsistent"] == 0
    assert data["systems"]["sft"]["kl"] == 0 and data["systems"]["made"]["eos_rate"] is None
    assert data["systems"]["ppo"]["gold"] is not None and data["judge"]["kind"] == "gold"
    assert (folder / "evaluation.png").stat().st_size > 10_000
    assert json.loads((folder / "hyperparams.json").read_text())["config"]["best_of"] == "2,3"


def test_without_best_of_the_pairs_are_those_of_the_readme(call, runs, prompts):
    assert call(THREE, "--judge gold --prompts", str(prompts))[0] == 0
    pairs = [(pair["a"], pair["b"]) for pair in result(runs)["pairs"]]
    assert pairs == [("sft", "vanilla"), ("ppo", "vanilla"), ("ppo", "sft")]


def test_the_same_command_gives_the_same_result_and_its_answers_are_a_system(call, runs, prompts):
    flags = ("-s sft_t -p ppo_t --judge gold --prompts", str(prompts))
    call(*flags)
    first = result(runs)
    answers = newest(runs) / "answers"
    call(*flags)
    assert result(runs) == first
    shutil.rmtree(runs / ".cache")
    call(*flags)
    assert result(runs) == first
    call(f"--system a={answers}/sft.jsonl --system b={answers}/ppo.jsonl --judge gold --prompts", str(prompts))
    again = result(runs)
    assert again["pairs"][0]["win_rate"] == first["pairs"][0]["win_rate"]
    assert again["systems"]["a"]["gold"] == first["systems"]["sft"]["gold"]


def test_prompts_and_decoding(call, runs):
    code, out, _ = call("-s sft_t -p ppo_t --judge gold --limit 3 --temperature 0 --max-new-tokens 4")
    assert code == 0 and "--prompts demo" in out and "3 prompts from the demo's held-out test prompts" in out
    data = result(runs)
    assert data["systems"]["ppo"]["kl"] is None and data["settings"]["temperature"] == 0
    assert data["systems"]["ppo"]["mean_tokens"] <= 4


@pytest.mark.parametrize("family", EVERY, indirect=True, scope="session")
def test_a_reward_model_and_a_function_as_judges(call, runs, prompts, tmp_path):
    (tmp_path / "mine.py").write_text("def short(prompts, answers):\n    return [-float(len(a)) for a in answers]\n")
    code, _, _ = call(f"-s sft_t -p ppo_t --judge {tmp_path}/mine.py:short --prompts", str(prompts))
    assert code == 0 and result(runs)["systems"]["sft"]["gold"] < 0
    code, _, _ = call("-s sft_t -p ppo_t --judge rm:rm_t --prompts", str(prompts))
    data, answers = result(runs), newest(runs) / "answers"
    assert code == 0 and data["judge"]["kind"] == "rm:rm_t"
    score = score_texts(load_reward_model(runs / f"rm_t_{TIME}" / "final", "-c"), Machine())
    found = {}
    for name in ("sft", "ppo"):
        rows = [json.loads(line) for line in (answers / f"{name}.jsonl").read_text().splitlines()]
        found[name] = score([r["prompt"] for r in rows], [r["response"] for r in rows])
        assert data["systems"][name]["gold"] == pytest.approx(np.mean(found[name]), abs=1e-4)
    assert data["pairs"][0]["win_rate"] == np.mean(np.array(found["ppo"]) > np.array(found["sft"]))


def test_a_language_model_as_judge(call, runs, prompts, server):
    server.behaviour = "first"
    flags = ("-s sft_t -p ppo_t --yes --judge-model judge-1 --base-url", server.url, "--prompts", str(prompts))
    code, out, err = call(*flags)
    assert code == 0 and "questions: 10; judge judge-1" in out and "sk-test" not in out + err
    (pair,) = result(runs)["pairs"]
    assert (pair["win_rate"], pair["consistency"], pair["first_position_rate"]) == (0.5, 0.0, 1.0)
    asked = server.requests
    assert asked == 10 and call(*flags)[0] == 0 and server.requests == asked  # all of it was kept
    assert not any(b"sk-test" in p.read_bytes() for p in runs.rglob("*") if p.is_file() and "eval_" in str(p))


def test_why_verdicts_are_missing_stands_at_the_end_and_in_the_report(call, runs, prompts, server):
    flags = ("-s sft_t -p ppo_t --yes --judge-model judge-1 --base-url", server.url, "--prompts", str(prompts))
    server.answer = lambda texts: "Both are *fine*."
    code, _, err = call(*flags)
    end = err[err.index("comparisons have a verdict") :]
    assert code == 1 and "questions 5 answered unclearly: no verdict (Both are *fine*.)" in end
    assert "questions 5 not asked: stopped after 5 questions in a row without a clear answer" in end
    judge = result(runs)["judge"]
    assert judge["unclear"] == {"no verdict": 5} and judge["examples"] == {"no verdict": "Both are *fine*."}
    page = (newest(runs) / "evaluation.md").read_text()
    assert "- 5 answered unclearly: no verdict (Both are &#42;fine&#42;.)" in page and server.requests == 5
    server.answer, server.behaviour = None, "500"
    code, _, err = call(*flags)
    assert code == 1 and "questions 10 without an answer: HTTP 500 (request with" in err and "sk-test" not in err


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("-s sft_t -p ppo_t", "ppo_t_vs_sft_t"),
        ("-s sft_t -p ppo_t -v sft_vanilla_t --best-of 2", "ppo_t_vs_sft_t_vs_sft_vanilla_t"),
        ("-s sft_t --system my.own=FILE", "my.own_vs_sft_t"),
        ("-s RUNS/sft_t_TIME/final -p RUNS/ppo_t_TIME", "ppo_t_vs_sft_t"),
        ("-s sft_t -p ppo_t -n mine", "mine"),
    ],
)
def test_an_evaluation_is_called_after_what_is_compared(call, runs, prompts, tmp_path, flags, name):
    (tmp_path / "made.jsonl").write_text("".join(json.dumps({"prompt": p, "response": "Yes."}) + "\n" for p in PROMPTS))
    for short, place in {"FILE": tmp_path / "made.jsonl", "RUNS": runs, "TIME": TIME}.items():
        flags = flags.replace(short, str(place))
    assert call(flags, "--judge gold --prompts", str(prompts))[0] == 0
    (folder,) = runs.glob("eval_*")
    assert re.fullmatch(rf"eval_{re.escape(name)}_\d{{14}}", folder.name)
    assert (folder / "evaluation.md").read_text().startswith(f"# Evaluation {name}\n")


def test_names_of_folders_are_short_and_safe():
    def model(source, flag="-v"):
        return System("x", "huggingface", source, flag)

    assert evaluate.name_of([model("owner/gpt 2:medium"), model("gpt2")]) == "gpt2_vs_gpt-2-medium"
    assert (
        evaluate.name_of([model("/a/" + "m" * 300), model("/a/\u4e16\u754c"), model("gpt2")])
        == "gpt2_vs_x_vs_" + "m" * 40
    )
    assert evaluate.name_of([model("gpt2"), model("gpt2")]) == "gpt2"
    assert len(evaluate.name_of([model(f"/a/{i}" + "m" * 300) for i in range(9)])) < 200


def test_what_could_not_be_judged_is_reported_and_asked_again(call, runs, prompts, server):
    flags = ("-s sft_t -p ppo_t --yes --judge-model judge-1 --base-url", server.url, "--prompts", str(prompts))
    server.answer = lambda texts: '"A"' if "crab" in texts[0] else "no idea"
    code, out, err = call(*flags)
    assert code == 1 and "1 comparisons have a verdict, 4 were answered unclearly and 0 not at all" in err
    (pair,) = result(runs)["pairs"]
    assert (pair["n"], pair["unparsed"], pair["failed"]) == (1, 4, 0) and "written to" in out
    server.answer, server.behaviour = None, "500"
    code, _, err = call(*flags)
    (pair,) = result(runs)["pairs"]
    assert code == 1 and (pair["n"], pair["unparsed"], pair["failed"]) == (1, 0, 4) and "4 not at all" in err
    server.behaviour = "longer"
    before = server.asked.copy()
    assert call(*flags)[0] == 0 and result(runs)["pairs"][0]["n"] == 5
    assert all("crab" not in texts[0] for texts in server.asked - before)


def test_the_judge_is_not_paid_without_consent(call, runs, prompts, server, monkeypatch):
    flags = ("-s sft_t -p ppo_t --judge-model judge-1 --base-url", server.url, "--prompts", str(prompts))
    assert "--yes: is needed to ask the judge up to 10 times" in error(call(*flags))
    assert not list(runs.glob("eval_*"))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    for said, code in (("n", 1), ("", 1), ("y", 0)):
        monkeypatch.setattr("builtins.input", lambda question, said=said: said)
        found, out, _ = call(*flags)
        assert found == code and ("nothing was asked" in out) == bool(code)
        assert (server.requests == 0) == bool(code)


def test_ctrl_c_keeps_what_was_answered(call, runs, prompts, server, monkeypatch):
    flags = ("-s sft_t -p ppo_t -v sft_vanilla_t --yes --judge-model judge-1 --base-url", server.url, "--prompts")
    compare, done = evaluate.compare, []

    def one_pair_only(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(compare(*arguments))
        return done[0]

    monkeypatch.setattr(evaluate, "compare", one_pair_only)
    code, _, err = call(*flags, str(prompts))
    assert code == 130 and "verdicts so far are kept" in err and server.requests == 10
    monkeypatch.setattr(evaluate, "compare", compare)
    assert call(*flags, str(prompts))[0] == 0
    assert server.requests == 30 and set(server.asked.values()) == {1}


@pytest.mark.parametrize("behaviour", ["401", "404"])
def test_a_wrong_key_and_an_unknown_model_are_one_line(call, prompts, server, behaviour):
    server.behaviour = behaviour
    flags = ("-s sft_t -p ppo_t --yes --judge-model judge-1 --base-url", server.url, "--prompts", str(prompts))
    code, _, err = call(*flags)
    last = err.strip().splitlines()[-1]  # a progress bar stands before it
    assert code == 2 and last.startswith("error: ") and "Traceback" not in err and "sk-test" not in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "two systems are needed"),
        ("-s sft_t -p sft_t", "-p sft_t: holds an SFT model; give a run of train_ppo.py"),
        ("-s nowhere -p ppo_t", "-s nowhere: no such run"),
        ("-s sft_t -p ppo_t --prompts none.csv", "--prompts none.csv: no such file"),
        ("-s sft_t -p ppo_t --judge nobody", "--judge nobody: there are openai, gold"),
        ("-s sft_t -p ppo_t --judge rm:sft_t", "--judge rm:sft_t: holds an SFT model; give a run of train_rm.py"),
        ("-s sft_t -p ppo_t --judge gold --best-of 4,x", "--best-of 4,x: give different numbers"),
        ("-s sft_t -p ppo_t --judge gold --best-of 1", "--best-of 1: give different numbers of at least 2"),
        ("-s sft_t -v sft_vanilla_t --judge gold --best-of 4", "--best-of: a reward model has to choose"),
        ("-s sft_t -p ppo_t --judge gold --best-of 4 --temperature 0", "--best-of: greedy samples are all alike"),
        ("-s sft_t -p ppo_t --judge gold --max-new-tokens 96", "--max-new-tokens 96: the context is 96 tokens"),
        ("-s sft_t -p ppo_t --temperature -0.5", "--temperature -0.5: 0 is greedy"),
        ("-s sft_t -p ppo_t --concurrency 0", "--concurrency 0: must be at least 1"),
        ("-s sft_t -p ppo_t --judge-price 3", "--judge-price 3: give IN,OUT"),
        ("-s sft_t -p ppo_t -n a/b", "-n 'a/b': a name of a folder is needed"),
        ("-s sft_t -p ppo_t -n ..", "-n '..': a name of a folder is needed"),
        ("-s sft_t -p ppo_t --max-wait -1", "--max-wait -1.0: must be at least 0"),
        ("-s sft_t -p ppo_t --base-url localhost:8000", "--base-url localhost:8000: must begin with http://"),
        ("-s sft_t -p ppo_t --limit many", "--limit"),
        ("-s sft_t -p ppo_t --jugde gold", "--jugde"),
    ],
)
def test_wrong_input_is_one_line(call, runs, flags, message):
    assert message in error(call(flags))
    assert not list(runs.glob("eval_*"))


def test_commands_of_the_documentation_parse():
    text = (REPO / "docs" / "evaluation.md").read_text(encoding="utf-8")
    commands = re.findall(r"^ {4}python src/utils/evaluate\.py (.*)$", text, re.M)
    assert len(commands) >= 2
    for command in commands:
        assert parse_flags(shlex.split(command), "").sft


def test_the_script_runs_from_both_places(runs, prompts):
    words = f"-s sft_t -p ppo_t --judge gold --device cpu --prompts {prompts} --runs-dir {runs}".split()
    places = (("root", "", "src/utils/evaluate.py"), ("src", "src", "utils/evaluate.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, script, *words, "-n", name], cwd=REPO / folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for name, folder, script in places
    ]  # fmt: skip
    for child, (name, *_) in zip(processes, places):
        out, err = child.communicate(timeout=120)
        assert child.returncode == 0, err
        assert re.search(rf"written to \S+/eval_{name}_\d{{14}}$", out.strip())
