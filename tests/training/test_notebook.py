"""tensorboard.ipynb as committed, and executed from top to bottom on real runs of the three stages."""

import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from scripts import call, newest

from experiments.doctor.record import read_series
from experiments.run_plots import CURVES, STAGES, read_metrics, reading_table
from utils.runs.folder import REPO

pytestmark = pytest.mark.slow

NOTEBOOK = REPO / "tensorboard.ipynb"
WHERE = 'RUNS_DIR = "runs"'


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """One small run of each stage."""
    folder = tmp_path_factory.mktemp("runs") / "with a space"
    gold = REPO / "src/utils/demo/gold.py"
    for stage, arguments in {
        "sft": "-n seen --max-steps 1",
        "rm": "-n seen -p sft_seen --max-steps 1",
        "ppo": f"-n seen -a sft_seen -c rm_seen --eval-reward-fn {gold}:gold_reward",
    }.items():
        # `call` splits its arguments at blanks: the runs are made elsewhere and moved.
        result = call(stage, arguments, folder.parent / "plain")
        assert result.code == 0, result.err
    shutil.move(folder.parent / "plain", folder)
    return folder


@pytest.fixture(autouse=True)
def _own_jupyter(tmp_path, monkeypatch) -> None:
    """No settings, kernels or history of the person who runs the tests."""
    for name in ("IPYTHONDIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"):
        folder = tmp_path / "jupyter" / name
        folder.mkdir(parents=True)
        monkeypatch.setenv(name, str(folder))


class WithPerson(NotebookClient):
    """As a front end with a person in front of it: it says that prompts can be answered."""

    async def async_start_new_kernel_client(self, **options):
        client = await super().async_start_new_kernel_client(**options)
        client.allow_stdin = True
        return client


def execute(runs: Path, folder: Path, client: type[NotebookClient] = NotebookClient) -> list[dict]:
    """All outputs of the notebook on these runs, executed in `folder`; an error in a cell is raised."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert sum(WHERE in cell.source for cell in notebook.cells) == 1
    for cell in notebook.cells:
        cell.source = cell.source.replace(WHERE, f"RUNS_DIR = {str(runs)!r}")
    client(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    return outputs


def printed(outputs: list[dict]) -> str:
    return "".join(o.text for o in outputs if o.output_type == "stream")


def shown(outputs: list[dict], kind: str) -> list[str]:
    return [o.data[kind] for o in outputs if kind in o.get("data", {})]


def test_the_notebook_is_committed_without_outputs_and_runs_on_any_python3() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert all(cell.metadata == {} for cell in notebook.cells)


def test_every_tag_that_a_panel_asks_for_is_one_that_the_stage_logs(runs) -> None:
    for stage, curves in CURVES.items():
        logged = (newest(runs, f"{stage}_seen") / "metrics.jsonl").read_text()  # null counts: a tiny run has constants
        assert [tag for curve in curves for tag in curve.tags if f'"{tag}": ' not in logged] == []


def test_every_tag_that_a_page_names_is_one_that_a_stage_logs(runs) -> None:
    logged = {tag for stage in STAGES for tag in read_series(newest(runs, f"{stage}_seen") / "metrics.jsonl")}
    groups = "|".join({tag.partition("/")[0] for tag in logged})
    for page in [REPO / "README.md", *(REPO / "docs").glob("*.md")]:
        named = re.findall(rf"`((?:{groups})/\w+)`", page.read_text(encoding="utf-8"))
        assert {tag.replace("PHASE", "rollout") for tag in named} <= logged, page
    assert len({tag for tag in logged if "/" not in tag}) == 0


def test_all_stages_from_the_root(runs) -> None:
    outputs = execute(runs, REPO)
    assert len(shown(outputs, "image/png")) == len(STAGES)
    tables = [reading_table(stage, newest(runs, f"{stage}_seen")) for stage in STAGES]
    assert shown(outputs, "text/markdown") == tables
    said = printed(outputs)
    assert "TensorBoard was not started" in said and "No " not in said
    assert shown(outputs, "text/html") == []


def test_a_missing_stage_is_named_and_a_person_gets_tensorboard(runs, tmp_path, monkeypatch) -> None:
    some, arguments = tmp_path / "some runs", tmp_path / "arguments"
    run = newest(runs, "ppo_seen")
    (some / run.name).mkdir(parents=True)
    shutil.copy(run / "metrics.jsonl", some / run.name)
    program = tmp_path / "tensorboard"
    program.write_text(f"#!{sys.executable}\nimport sys\nopen({str(arguments)!r}, 'w').write('|'.join(sys.argv[1:]))\n")
    program.chmod(0o755)
    monkeypatch.setenv("TENSORBOARD_BINARY", str(program))

    outputs = execute(some, REPO / "src" / "utils", WithPerson)
    assert len(shown(outputs, "image/png")) == 1
    said = printed(outputs)
    assert said.count("No ") == 2 and f"No SFT run in {some}" in said and f"No reward model run in {some}" in said
    assert "make demo" in said and "not started" not in said
    assert arguments.read_text().split("|")[:2] == ["--logdir", str(some)]


def test_no_runs_at_all(tmp_path) -> None:
    outputs = execute(tmp_path / "nothing", REPO)
    assert shown(outputs, "image/png") == []
    assert f"No runs in {tmp_path / 'nothing'} yet: `make demo` makes one of each stage" in printed(outputs)


def test_outside_the_repository_it_says_where_to_start(tmp_path) -> None:
    with pytest.raises(Exception, match="is not in the repository: start Jupyter there"):
        execute(tmp_path, tmp_path)


def test_figures_of_a_real_run_are_those_in_the_file(runs) -> None:
    metrics = read_metrics(newest(runs, "ppo_seen"))
    assert metrics["objective/kl"][0] == [1, 2] and metrics["eval/gold"][0] == [0, 1, 2]
    assert metrics["objective/kl"][1][0] == 0 and "step" not in metrics and "time" not in metrics
