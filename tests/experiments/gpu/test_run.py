"""`-t gpu`, rehearsed on the CPU: every part, its files, and what goes wrong in one of them."""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from config.model_configs import PRESETS, get_configs
from config.user_error import UserError
from experiments.bench import bounds
from experiments.bench.work import Work
from experiments.gpu import beside, checks, profiling, rows, run, works
from experiments.gpu.card import Card
from experiments.gpu.checks import Child, finish
from experiments.gpu.report import Report
from experiments.main import Parser
from models.gpt import GPT
from training.engine.runtime import Runtime

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
CARD = Card("cpu", 16.0)
DEMO = {"systems": {name: {"gold": 1.0, "win_rate": 0.9, "kl": 3.0} for name in ("sft", "ppo")}}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The hardware's own rates take seconds to measure on a CPU; and what the command sets is put back."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(Card, "measured_flops", 1e12)
    monkeypatch.setattr(Card, "copy_rate", 1e10)
    monkeypatch.setattr(Card, "seconds", lambda self, once, *_, **__: (once(), 0.5)[1])


def call(out, *words) -> int:
    return run.run(Parser(), ["--device", "cpu", "--tiny", "--out", str(out), *words])


def part(out, number: int) -> dict:
    return json.loads((out / f"part{number}.json").read_text())


def words(out, number: int) -> dict[str, str]:
    return {verdict["what"]: verdict["word"] for verdict in part(out, number)["verdicts"]}


def test_part_1_runs_the_tests_and_says_that_a_cpu_skips_them(tmp_path, capsys):
    assert call(tmp_path, "--part", "1") == 0
    found = part(tmp_path, 1)["data"]
    assert found["counts"]["skipped"] > 20 and found["code"] == 0 and not found["failed"]
    assert "skipped" in (tmp_path / "tests.txt").read_text() and "all are skipped" in capsys.readouterr().out


def test_part_2_is_left_out_on_a_cpu(tmp_path):
    assert call(tmp_path, "--part", "2") == 0 and words(tmp_path, 2) == {"the demo": "left out"}


def test_part_3_measures_every_kind_of_work(tmp_path, capsys):
    assert call(tmp_path, "--part", "3") == 0
    found = part(tmp_path, 3)["data"]["rows"]
    assert list(found) == [f"{preset} {kind}" for preset in rows.TINY for kind in works.KINDS]
    for row in found.values():
        assert row["seconds"] == 0.5 and row["tokens_s"] > 0 and row["mfu"] > 0
        assert (row["planned"] is None) == (row["kind"] == "sampling")
    assert found["gpt2-nano ppo"]["parts"] and found["gpt2-nano sampling"]["of_bandwidth"] > 0
    assert capsys.readouterr().out.count("part 3 | ") == len(found)
    page = (tmp_path / "table.md").read_text()
    assert "## 3. " in page and "| llama-nano/lora | ppo | 0.5 |" in page and "torch " in page


def test_part_4_compares_the_same_weights(tmp_path):
    assert call(tmp_path, "--part", "4") == 0
    found = part(tmp_path, 4)["data"]["rows"]
    assert set(found) == {f"{preset} {kind}" for preset in ("gpt2-nano", "llama-nano") for kind in ("sampling", "SFT")}
    assert all(row["ratio"] == 1 for row in found.values())
    assert found["gpt2-nano sampling"]["same_greedy_tokens"] == 1
    assert words(tmp_path, 4)["gpt2-nano sampling, transformers"] == "MISSED"


def test_part_5_profiles(tmp_path):
    assert call(tmp_path, "--part", "5") == 0
    found = part(tmp_path, 5)
    for name in rows.TINY:
        for kind in ("decoding step", "PPO iteration"):
            assert "addmm" in found["tables"][f"{name} {kind}"] and found["data"][f"{name} {kind}"]["operations"]
    assert words(tmp_path, 5)["gpt2-nano sampling, waits"] == "left out"


def test_one_page_holds_the_parts_of_several_commands(tmp_path):
    for number in ("2", "3"):
        call(tmp_path, "--part", number, "--minutes", "1e-9")
    page = (tmp_path / "table.md").read_text()
    assert page.index("## 2. ") < page.index("## 3. ")
    assert len(list(tmp_path.iterdir())) <= 8


def test_when_the_time_is_up_what_is_left_is_left_out(tmp_path):
    assert call(tmp_path, "--part", "3", "--part", "4", "--part", "5", "--minutes", "1e-9") == 0
    for number in (3, 4, 5):
        assert set(words(tmp_path, number).values()) == {"left out"}


def test_an_error_ends_neither_its_part_nor_the_next(tmp_path, monkeypatch):
    """One row fails, one comparison, one profile, and a whole part: the exit code tells, and all else is measured."""

    def broken(*_):
        raise ValueError("broken\nby the test")

    monkeypatch.setattr(rows, "measure_first", broken)
    monkeypatch.setattr(beside, "compare_sampling", broken)
    monkeypatch.setattr(profiling, "profile_iteration", broken)
    monkeypatch.setattr(
        beside, "compare_steps", lambda *_: {"ours_tokens_s": 1, "peer_tokens_s": 2, "ratio": 0.5} | {"note": ""}
    )
    assert call(tmp_path, "--part", "3", "--part", "4", "--part", "5") == 1
    assert words(tmp_path, 3) == {"measure_first": "FAILED"}
    assert words(tmp_path, 4)["gpt2-nano sampling"] == "FAILED" and "gpt2-nano SFT" in part(tmp_path, 4)["data"]["rows"]
    assert words(tmp_path, 5)["gpt2-nano PPO iteration"] == "FAILED"
    assert words(tmp_path, 5)["gpt2-nano decoding step"] == "ok"
    assert part(tmp_path, 3)["verdicts"][0]["figure"] == "ValueError: broken"


@pytest.mark.parametrize(
    ("error", "planned", "word"),
    [(torch.OutOfMemoryError, 20e9, "ok"), (torch.OutOfMemoryError, 10e9, "MISSED"), (RuntimeError, 10e9, "FAILED")],
)
def test_a_row_that_does_not_fit_is_a_result(tmp_path, monkeypatch, error, planned, word):
    def prepared(*_):
        raise error("CUDA out of memory")

    monkeypatch.setattr(rows, "prepared", prepared)
    monkeypatch.setattr(rows, "planned_peak", lambda *_: planned)
    report = Report(tmp_path)
    row = rows.measure_row(works.work_of("gpt2-nano", "sft", CARD, True), CARD, report)
    assert [v.word for v in report.verdicts] == [word] and report.failed == (word == "FAILED") and row["missing"]
    assert rows.as_table({"x": row}, CARD)


@pytest.mark.parametrize(("allocated", "word"), [(1.0, "ok"), (0.88, "ok"), (1.2, "MISSED"), (0.8, "MISSED")])
def test_the_plan_is_held_against_what_was_taken(tmp_path, monkeypatch, allocated, word):
    work = works.work_of("gpt2-nano", "sft", CARD, True)
    planned = works.planned_peak(work, CARD)
    monkeypatch.setattr(Card, "peaks", lambda _: {"allocated": planned * allocated, "reserved": planned * 2})
    report = Report(tmp_path)
    row = rows.measure_row(work, CARD, report)
    assert report.verdicts[0].word == word and row["planned_over_allocated"] == pytest.approx(1 / allocated)
    assert row["planned_over_reserved"] == pytest.approx(0.5)


def test_works_are_those_of_presets_that_are_there(monkeypatch):
    assert set(rows.presets(rows.FIRST + rows.REST)) <= set(PRESETS) and "gpt2-xl/lora" in rows.presets(rows.FIRST)
    assert rows.presets(("gpt2", "not-yet")) == ["gpt2"]
    assert len(set(rows.FIRST + rows.REST)) == 16
    shapes = {w.kind: (w.batch, w.prompt + w.new, w.new) for w in rows.works(("gpt2",), CARD, False)}
    assert shapes["sampling"] == (64, 256, 128) and shapes["sft"][:2] == (32, 512) and shapes["ppo"] == (32, 320, 64)


@pytest.mark.parametrize("preset", ["gpt2-nano", "gpt2-nano/lora"])
@pytest.mark.parametrize("kind", ["sft", "rm", "ppo"])
def test_flops_of_a_model_are_those_of_the_benchmark(preset, kind):
    """Counted from a model's matrices, for any family; GPT-2's are also counted from its sizes."""
    config = get_configs(preset)
    sizes = asdict(config)
    work = Work("w", kind, "", preset=preset, batch=4, prompt=8, new=4, sizes=sizes)
    per_unit = bounds.flops(work) * (works.step_tokens(work) if kind != "ppo" else 1)
    assert works.Sizes.of(GPT(config)).flops(work) == per_unit


def test_a_decoding_step_reads_every_weight_and_the_cache():
    model = GPT(get_configs("gpt2-nano"))
    work = works.work_of("gpt2-nano", "sampling", CARD, True)
    cache = 2 * 2 * model.config.n_layer * model.config.n_embd * work.batch * (work.prompt + work.new / 2)
    weights = 2 * (bounds.block_weights(vars(model.config)) + bounds.head_weights(vars(model.config)))
    assert works.Sizes.of(model).step_bytes(work) == cache + weights


@pytest.mark.parametrize(("preset", "shared"), [("gpt2-nano/lora", True), ("gpt2-nano", False)])
def test_the_roles_of_ppo_share_what_they_share_in_training(preset, shared):
    config = works.stage_config(works.work_of(preset, "ppo", CARD, True))
    runtime = Runtime(config.device, config.dtype, 0)
    reference, reward, actor, critic = works.make_models(config, get_configs(preset), runtime)
    name = "transformer.h.0.mlp.c_fc.weight"
    base = reference.get_parameter(name)
    assert [m.get_parameter(name) is base for m in (reward, actor, critic)] == [shared] * 3
    assert torch.equal(actor.get_parameter(name).bfloat16(), base.bfloat16())
    trains = {
        kind: [n for n, p in m.named_parameters() if p.requires_grad] for kind, m in (("a", actor), ("r", reward))
    }
    assert trains["a"] and not trains["r"] and all("lora" in n for n in trains["a"]) is shared
    assert type(critic).role == "critic" and type(reward).role == "reward" and not reference.training


@pytest.mark.parametrize(
    ("code", "writes", "seconds", "word", "failed"),
    [(0, True, 20, "ok", False), (1, True, 20, "MISSED", False), (1, False, 20, "FAILED", True)]
    + [(0, True, 0, "FAILED", True)],
)
def test_a_demo_that_did_not_work_is_an_aim_missed_and_one_without_figures_a_failure(
    tmp_path, code, writes, seconds, word, failed
):
    """The last one does not end by itself: it is stopped when the time is up."""
    folder, report = tmp_path / "demo", Report(tmp_path / "out")
    script = f"import json, pathlib, sys, time; time.sleep({0 if seconds else 60});"
    if writes:
        script += f"pathlib.Path({str(folder / 'demo.json')!r}).write_text(json.dumps({DEMO!r}));"
    child = Child("bf16", [sys.executable, "-c", script + f"print('the end'); sys.exit({code})"], folder).start()
    finish([child], time.monotonic() + seconds)
    checks.report_demo(child, False, report)
    assert [v.word for v in report.verdicts] == [word] and report.failed is failed
    assert child.process.poll() is not None
    if seconds:
        assert (
            child.code == code and child.last_line == "the end" and "the end" in (report.out / "demo.txt").read_text()
        )


def test_a_process_that_has_ended_keeps_its_time(tmp_path):
    quick, slow = (
        Child(name, [sys.executable, "-c", f"import time; time.sleep({seconds})"], tmp_path).start()
        for name, seconds in (("quick", 0), ("slow", 60))
    )
    finish([quick, slow], time.monotonic() + 2)
    times = quick.seconds, slow.seconds
    finish([quick, slow], 0.0)
    assert (quick.code, slow.code) == (0, None) and times == (quick.seconds, slow.seconds) and times[0] < 1.9 < times[1]


@pytest.mark.parametrize(("seconds", "word"), [(80, "ok"), (100, "MISSED")])
def test_the_demo_alone_has_an_aim_for_its_time(tmp_path, seconds, word):
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "demo.json").write_text(json.dumps(DEMO))
    child = Child("bf16 alone", [], folder, seconds=seconds, code=0)
    child.log.write_text("")
    report = Report(tmp_path / "out")
    checks.report_demo(child, True, report)
    assert [v.word for v in report.verdicts] == ["ok", word]


@pytest.mark.parametrize(
    ("text", "code", "word"),
    [
        ("..\n57 passed, 1 skipped in 101.20s (0:01:41)", 0, "ok"),
        ("FAILED tests/a.py::b - x\n1 failed, 56 passed in 9s", 1, "FAILED"),
        ("3 skipped in 1s", 0, "MISSED"),
        ("ImportError: x", 4, "FAILED"),
        ("", None, "FAILED"),
    ],
)
def test_tests_that_fail_are_a_failure(tmp_path, text, code, word):
    child = Child("tests", [], tmp_path, seconds=101, code=code)
    child.log.write_text(text)
    report = Report(tmp_path / "out")
    checks.report_tests(child, "cuda", report)
    assert [v.word for v in report.verdicts] == [word]
    if code == 1:
        assert part(report.out, 1)["data"]["failed"] == ["FAILED tests/a.py::b - x"]


def test_parts_1_and_2_run_side_by_side(tmp_path, monkeypatch):
    """On a GPU: four processes at once, whose verdicts come in order; then the demo alone, with what time is left."""
    started = []

    def child(name, folder):
        started.append(name)
        script = f"import pathlib; pathlib.Path({str(folder / name / 'demo.json')!r}).write_text({json.dumps(DEMO)!r})"
        return Child(name, [sys.executable, "-c", script + "; print('3 passed in 1s')"], folder / name).start()

    monkeypatch.setattr(run, "start_tests", lambda folder, device: child("tests", folder))
    monkeypatch.setattr(run, "start_demo", lambda folder, device, dtype, name="": child(name or dtype, folder))
    monkeypatch.setattr(run.Session, "describe", lambda self: started.append("describe"))
    assert run.run(Parser(), ["--part", "1", "--part", "2", "--out", str(tmp_path)]) == 0
    assert started == ["tests", "bf16", "fp32", "fp16", "describe", "bf16 alone"]
    assert words(tmp_path, 2)["demo fp16"] == words(tmp_path, 2)["demo bf16 alone, time"] == "ok"
    assert (tmp_path / "demo.txt").read_text().count("== ") == 4


def test_a_trace_tells_operations_from_kernels(monkeypatch):
    """Kernels are counted once, a range that the optimizer marks on the GPU is none of them."""

    def event(key, kind, own, count, annotation=False):
        times = {"self_device_time_total": own, "self_cpu_time_total": 9.0}
        return SimpleNamespace(key=key, device_type=kind, count=count, is_user_annotation=annotation, **times)

    events = [
        event("aten::mm", DeviceType.CPU, 3e6, 2),
        event("aten::add", DeviceType.CPU, 1e6, 5),
        event("aten::view", DeviceType.CPU, 0.0, 9),
        event("sgemm", DeviceType.CUDA, 3e6, 2),
        event("add_kernel", DeviceType.CUDA, 1e6, 5),
        event("Optimizer.step#AdamW.step", DeviceType.CUDA, 4e6, 1),
        event("marked", DeviceType.CUDA, 4e6, 1, annotation=True),
    ]

    class Profile:
        def __init__(self, **_):
            self.key_averages = events.copy

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(profiling, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    card = Card("cuda")
    trace = profiling.traced(list, card)
    assert (trace.kernels, trace.busy) == (7, 4.0)
    assert trace.top() == [("aten::mm", 3.0, 2), ("aten::add", 1.0, 5)]
    step = trace.per_step(profiling.Trace({"aten::mm": (1.0, 1)}, 1, 1.0), 2)
    assert step.operations["aten::mm"] == (1.0, 0.5) and (step.kernels, step.busy) == (3, 1.5)
    said: list = []
    report, tables = SimpleNamespace(say=lambda *words: said.append(words)), {}
    found = profiling.told("x", trace, 8.0, card, report, tables)
    assert found["idle"] == 0.5 and "7 kernels, the GPU idles 50%" in said[0][2]
    assert "| `aten::mm` | 3000.000 | 37.5% | 2 |" in tables["x"]


def test_waits_are_counted_at_the_line_of_ours_that_waits():
    """torch warns from wherever it is; the line is that of the project which called it."""
    ours = compile("def wait(f):\n    f()\n", str(ROOT / "src/models/made_up.py"), "exec")
    theirs = compile(
        "import warnings\ndef sync():\n    warnings.warn('called a synchronizing CUDA operation')\n"
        "def other():\n    warnings.warn('something else')\n",
        "/usr/lib/torch/made_up.py", "exec",
    )  # fmt: skip
    space: dict = {}
    exec(ours, space)
    exec(theirs, space)
    with profiling.counted_syncs(CARD) as waits:
        for _ in range(3):
            space["wait"](space["sync"])
        space["wait"](space["other"])
        space["sync"]()
    assert waits == {"models/made_up.py:2": 3, "made_up.py:3": 1}


def test_the_cards_peak_is_that_of_its_data_sheet_or_the_measured_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    card = Card("cuda")
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("Tesla T4", 65e12),
        ("?", 1e12),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert card.peak_flops == peak


def test_processes_start_before_torch_is_loaded():
    code = "import sys; sys.path.insert(0, 'src'); import experiments.gpu.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--device", "cpu"], "--device cpu: tells nothing of a GPU; with --tiny"),
        (["--device", "cpu", "--tiny", "--minutes", "0"], "--minutes 0: must be above 0"),
        (["--device", "cpu", "--tiny", "--memory-gb", "nan"], "--memory-gb nan: must be above 0"),
        (["--part", "6"], "invalid choice: 6"),
        (["--out", __file__], "is a file; give a folder"),
        (["--part", "3"], "--device cuda: this machine has none that torch can see"),
    ],
)
def test_wrong_input(given, told, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        run.run(Parser(), given)
