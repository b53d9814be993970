"""A secret in every place that takes one: none is in what a run wrote or printed, whatever a server says of it."""

import functools
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState
from judge_server import JudgeServer
from scripts import call, newest, save_start

from config import scrub
from config.user_error import run_main
from experiments import main
from utils import evaluate
from utils.judging import judges
from utils.runs.folder import REPO

pytestmark = pytest.mark.slow

SECRETS = {
    name: f"{name}-0123456789"
    for name in ("password", "parameter", "variable", "keyfile", "proxy", "hftoken", "hubuser", "path")
}
PROMPTS = "What is tea?\nHi!\nWhy?\n"


@pytest.fixture(autouse=True)
def planted(tmp_path, monkeypatch) -> None:
    """The environment of somebody with many accounts."""
    monkeypatch.setattr(scrub, "_known", set())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False))
    monkeypatch.setenv("RLHF_CACHE_DIR", str(tmp_path / "runs" / ".cache" / "tokens"))
    monkeypatch.setenv("OPENAI_API_KEY", SECRETS["variable"])
    monkeypatch.setenv("HF_TOKEN", SECRETS["hftoken"])
    for name in ("HTTP_PROXY", "https_proxy"):
        monkeypatch.setenv(name, f"http://me:{SECRETS['proxy']}@127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    (tmp_path / "prompts.txt").write_text(PROMPTS)


def assert_nowhere(folder: Path, *printed: str) -> None:
    """No secret in any file below a folder, or in the texts."""
    for text in printed:
        assert not [secret for secret in SECRETS.values() if secret in text], text
    for file in (p for p in folder.rglob("*") if p.is_file() and p.name != "openai.key"):
        assert not [secret for secret in SECRETS.values() if secret.encode() in file.read_bytes()], file


def run(script, *argv: str) -> tuple[int, str, str]:
    """A script's main with the exit code, stdout and stderr that it would have."""
    AcceleratorState._reset_state(reset_partial_state=True)
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr("sys.argv", ["script.py", *argv])
        with pytest.raises(SystemExit) as stop:
            run_main(script)
    return stop.value.code, out.getvalue(), err.getvalue()


class TalkativeServer(JudgeServer):
    """Repeats the whole request, in errors or in the answer itself."""

    status = 200

    def serve(self, http: BaseHTTPRequestHandler) -> None:
        http.rfile.read(int(http.headers["Content-Length"]))
        known = f"{http.path} {dict(http.headers)} {list(SECRETS.values())}"
        if self.status == 200:
            self._completion(http, {"model": known}, json.dumps({"winner": "A", "because": known}), "stop")
        else:
            self._error(http, self.status, known, {"X-Request-Id": known.replace("\n", " ")}, code=known)


@pytest.fixture
def server(monkeypatch):
    options = functools.partial(judges.JudgeOptions, first_wait=0.01, max_attempts=2, give_up_after=2)
    monkeypatch.setattr(evaluate, "JudgeOptions", options)
    running = TalkativeServer()
    running.start()
    yield running
    running.close()


@pytest.mark.parametrize("with_file", [True, False])
@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 402, 429, 500])
def test_an_evaluation(status, with_file, server, tiny_runs, tmp_path):
    server.status = status
    runs = tmp_path / "runs"
    runs.mkdir()
    for folder in tiny_runs.iterdir():
        (runs / folder.name).symlink_to(folder)
    if with_file:
        (tmp_path / "openai.key").write_text(json.dumps({"OPENAI_API_KEY": SECRETS["keyfile"]}))
    url = (
        server.url.replace("http://", f"http://me:{SECRETS['password']}@")
        + f"?api_key={SECRETS['parameter']}&k="
        + (SECRETS["parameter"])
    )
    words = ["-s", "sft_t", "-v", "sft_vanilla_t", "--prompts", "prompts.txt", "--yes", "--device", "cpu"]
    code, out, err = run(
        functools.partial(evaluate.main, [*words, "--base-url", url, "--runs-dir", str(runs)]), f"--base-url={url}"
    )
    assert code == {200: 0, 429: 1, 500: 1}.get(status, 2), err
    assert "Traceback" not in err
    (folder,) = runs.glob("eval_*")
    record = json.loads((folder / "hyperparams.json").read_text())
    assert record["config"]["base_url"] == server.url and record["command"] == ["script.py", f"--base-url={server.url}"]
    if status in (200, 429, 500):
        assert json.loads((folder / "evaluation.json").read_text())["judge"]["base_url"] == server.url
    assert_nowhere(runs, out, err)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A folder of runs with an SFT model to start from."""
    return save_start(tmp_path_factory.mktemp("start"))


def test_all_stages_and_going_on(start, tmp_path):
    """What they write: records, figures, TensorBoard's events, samples, checkpoints with manifests. The data lie in a
    folder whose name holds a secret; that its record has none of it does not stop a resume."""
    runs, data = tmp_path / "runs", tmp_path / f"mirror?token={SECRETS['path']}&x"
    data.mkdir()
    (data / "rows.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No idea."}) + "\n"
            for i in range(40)
        )
    )
    printed = []
    words = {"sft": f"-p {start}", "rm": "-p sft_x", "ppo": "-a sft_x -c rm_x"}
    for stage, models in words.items():
        command = f"-n x {models} --dataset {data}/rows.jsonl"
        for more in ("", f" --resume {{run}}/checkpoints/step_0000000{1 if stage == 'ppo' else 2}"):
            more = more.format(run=newest(runs, f"{stage}_x")) if more else ""
            result = call(stage, command + more, runs)
            assert result.code == 0, result.err
            printed += [result.out, result.err]
        record = json.loads((newest(runs, f"{stage}_x") / "hyperparams.json").read_text())
        assert f"token={scrub.SHOWN}&x/rows.jsonl" in record["config"]["dataset"]
    assert list(runs.rglob("events.out.tfevents.*")) and list(runs.rglob("manifest.json"))
    assert_nowhere(runs, *printed)


HUB = f"https://me:{SECRETS['hubuser']}@huggingface.co/openai-community/gpt2"


@pytest.mark.parametrize("words", [
    f"sft -p {HUB}", f"sft -p {HUB}?token={SECRETS['parameter']}", f"sft --dataset {HUB}/rows.jsonl",
    f"sft --tokenizer {HUB} -p scratch", f"rm -p {HUB}", f"ppo -a {HUB}", f"sft --api-key {SECRETS['variable']}",
    f"sft -n {SECRETS['variable']} -p START", f"sft --resume {HUB}",
])  # fmt: skip
def test_wrong_words_of_training(words, start, tmp_path):
    stage, *arguments = words.replace("START", str(start)).split()
    result = call(stage, " ".join(arguments), tmp_path / "runs")
    assert result.code == 2 and result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    assert_nowhere(tmp_path, result.out, result.err)


@pytest.mark.parametrize("words", [
    f"-s {HUB} -v {HUB}", f"-s sft_t -v {HUB}", f"-s sft_t -p ppo_t --prompts hub:{HUB} --judge gold",
    f"-s sft_t -p ppo_t --system x={HUB}", f"-s sft_t -p ppo_t --base-url me:{SECRETS['password']}@host/v1",
    f"-s sft_t -p ppo_t --base-url ftp://me:{SECRETS['password']}@host/v1?k={SECRETS['parameter']}",
    f"-s sft_t -p ppo_t --judge {HUB}", f"-s sft_t -p ppo_t --judge-key {SECRETS['keyfile']}",
    f"-s sft_t -p ppo_t --judge gold -n {SECRETS['variable']}",
])  # fmt: skip
def test_wrong_words_of_an_evaluation(words, tiny_runs, tmp_path):
    more = ["--runs-dir", str(tmp_path / "runs"), "--device", "cpu", "--yes", "--limit", "1"]
    (tmp_path / "runs").mkdir()
    for folder in tiny_runs.iterdir():
        (tmp_path / "runs" / folder.name).symlink_to(folder)
    code, out, err = run(functools.partial(evaluate.main, [*words.split(), *more]))
    assert code == 2 and "error: " in err and "Traceback" not in err, err
    assert_nowhere(tmp_path, out, err)


@pytest.mark.parametrize("words", [
    f"-t gpt -m {HUB}", f"-t reward -m {HUB} --prompt x --response y", f"-t dataset --dataset {HUB}",
    f"-t tokenizer --tokenizer {HUB}", f"-t doctor {HUB}", f"-t overoptimisation {HUB}", f"-t gpt --token {HUB}",
])  # fmt: skip
def test_wrong_words_of_a_quick_look(words, tmp_path):
    code, out, err = run(main.main, *words.split())
    assert code == 2 and err.count("\n") == 1, err
    assert_nowhere(tmp_path, out, err)


def test_a_reward_function_that_tells_its_key(start, tmp_path):
    (tmp_path / "reward.py").write_text(
        "import os\ndef f(prompts, responses):\n    raise RuntimeError('refused ' + os.environ['OPENAI_API_KEY'])\n"
    )
    result = call("ppo", f"-a {start} --reward-fn {tmp_path}/reward.py:f", tmp_path / "runs")
    assert result.code == 2 and f"RuntimeError: refused {scrub.SHOWN}" in result.err
    assert_nowhere(tmp_path / "runs", result.out, result.err)


def test_a_traceback():
    code = (
        "import os, sys, warnings; sys.path.insert(0, 'src'); from config.user_error import run_main\n"
        "def main():\n"
        "    warnings.warn(os.environ['HF_TOKEN'])\n"
        "    raise ValueError(f\"{os.environ['https_proxy']} {os.environ['HF_TOKEN']}\")\n"
        "run_main(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert done.stderr.endswith(f"ValueError: http://127.0.0.1:9 {scrub.SHOWN}\n")
    assert_nowhere(REPO / "none", done.stdout, done.stderr)
