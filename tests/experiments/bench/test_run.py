"""The benchmark: works of ours on a nano model, rows and JSON from made-up figures, peers that are not there."""

import argparse
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from config.model_configs import get_configs
from config.user_error import UserError
from experiments.bench import bounds as bench_bounds
from experiments.bench import host as bench_host
from experiments.bench import ours as bench_ours
from experiments.bench import peers as bench_peers
from experiments.bench import run as bench
from experiments.bench.bounds import Hardware
from experiments.bench.table import WITH_DEFAULTS, Row, as_json, gpu_markdown, markdown, scaling_markdown
from experiments.bench.work import SECONDS, WORKS, Work, gpu_works, scaling_works
from experiments.main import Parser
from models.families import load_checkpoint, new_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
KEYS = ["work", "ours", "peer", "ratio", "unit", "ours_peak_gb", "peer_peak_gb"]
KEYS += ["plain", "plain_ratio", "plain_peak_gb", "aim", "products", "stolen"]
TINY = Work("tiny", "sampling", "tiny", preset="gpt2-nano", batch=2, prompt=4, new=5, epochs=2, repeats=1)
MACHINE = {
    "cpu": "a CPU", "cores": 2, "memory_gb": 8.0, "os": "an OS", "python": "3.11", "rounds": 3, "load": 0.1,
    "stolen": 0.01, "bounds": {
        "bandwidth": 1e10, "matrix_flops": 1e12, "products_tokens_s": {"8": 300.0}, "packed_tokens_s": {"8": 400.0},
        "threads": 2,
    },
}  # fmt: skip


def flags(*words: str) -> argparse.Namespace:
    parser = Parser()
    bench.add_flags(parser)
    return parser.parse_args(list(words))


def row(work: Work, ours: list[float], peer: list[float], plain: tuple[float, ...] = ()) -> Row:
    made = Row(replace(work, sizes=bench.sizes_of(work.preset)))
    for figures, values in ((made.ours, ours), (made.peer, peer), (made.plain, plain)):
        for value in values:
            figures.add({"value": value, "peak_gb": value / 100, "versions": {"torch": "2"}})
    return made


@pytest.mark.parametrize(
    ("kind", "preset"),
    [("sampling", "gpt2-nano"), ("rollout", "gpt2-nano")]
    + [(kind, preset) for kind in ("sft", "rm", "ppo") for preset in ("gpt2-nano", "gpt2-nano/lora")],
)
def test_works_of_ours_run(kind, preset, monkeypatch):
    monkeypatch.setattr(bench_ours, "write_in_a_process_of_its_own", bench_ours.write_checkpoints)
    result = bench_ours.measure(replace(TINY, kind=kind, preset=preset, profiled=True))
    assert result["value"] > 0 and result["versions"]["torch"] == torch.__version__
    assert 0 < result["products"] < 1 and result["peak_gb"] > 0
    if kind == "ppo":
        assert set(result["parts"]) == {f"time/{part}_s" for part in ("rollout", "score", "reference", "update")}


def test_ppo_of_ours_shares_one_base_and_samples_full_responses(tmp_path, monkeypatch):
    """With adapters the reward model's trunk is the SFT model's; in full it is another one."""
    for preset, shared in (("gpt2-nano/lora", True), ("gpt2-nano", False)):
        folder = tmp_path / preset
        bench_ours.write_checkpoints(replace(TINY, preset=preset), folder)
        sft = load_checkpoint(folder / "sft", config=get_configs("gpt2-nano"))
        reward = load_checkpoint(folder / "rm", "reward")
        name = "transformer.h.0.mlp.c_fc.weight"
        assert torch.equal(sft.state_dict()[name], reward.state_dict()[name]) is shared
        if shared:
            assert reward.state_dict()["transformer.h.0.mlp.c_fc.lora_B"].any()
    tokenizer = bench_ours.endless(bench_ours.load_tokenizer(folder / "sft"))
    assert tokenizer.vocab_size == 1024 and tokenizer.eos_id not in range(1025)


def test_a_script_answers_in_its_last_line():
    work = replace(TINY, kind="bounds", sizes=bench.sizes_of("gpt2-nano"))
    result = bench.child(bench.OURS, work, sys.executable)
    assert result["bandwidth"] > 1e8 and result["matrix_flops"] > 1e8 and result["peak_gb"] > 0.05
    assert set(result["products_tokens_s"]) == set(result["packed_tokens_s"]) == {"8", "32"} and result["threads"] >= 1


def test_the_peers_are_looked_for_where_make_bench_puts_them():
    assert flags().peers == str(ROOT / ".venv-bench/bin/python")


def test_the_parent_loads_no_torch():
    """Linux hands a process's peak memory on to its children."""
    code = "import sys; sys.path.insert(0, 'src'); import experiments.bench.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_peers_import_only_what_they_measure():
    """The peers' environment has none of this project's requirements, and ours none of the peers."""
    code = (
        "import sys; sys.path.insert(0, 'src'); import experiments.bench.peers; "
        "sys.exit(bool({'torch', 'transformers', 'trl', 'peft', 'config', 'tyro', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert {work.peer for work in WORKS if work.peer} == set(bench_peers.PEERS) == set(bench_peers.PACKAGES)


def test_a_missing_peer_is_reported(monkeypatch):
    def absent(package):
        raise bench_peers.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(bench_peers.metadata, "version", absent)
    assert bench_peers.measure(WORKS[2]) == {"missing": "torch is not installed: make bench"}
    monkeypatch.undo()
    monkeypatch.setenv(bench_peers.NANOGPT, "")
    nanogpt = next(work for work in WORKS if work.name == "sft_nanogpt")
    assert "--nanogpt FOLDER" in bench_peers.measure(nanogpt)["missing"]


def test_a_peer_without_its_environment_is_a_row_and_no_error(monkeypatch, capsys, tmp_path):
    real = bench.child

    def child(script, work, python, environment=None):
        if script == bench.PEERS:
            return real(script, work, python, environment)
        bounds = MACHINE["bounds"]
        return bounds if work.kind == "bounds" else {"value": 100.0, "peak_gb": 1.0}

    monkeypatch.setattr(bench, "child", child)
    file = tmp_path / "bench.json"
    wanted = flags("--only", "sampling_b8,demo_rollout", "--peers", "/nowhere/python", "--json", str(file))
    assert bench.measure_all(wanted) == 0
    report = json.loads(file.read_text())
    assert [list(r) for r in report["rows"]] == [KEYS] * 2
    figures = ["sampling_b8", 100.0, None, None, "", 1.0, None, None, None, None, 2, None]
    assert report["rows"][0] | {"unit": "", "stolen": 0} == dict(zip(KEYS, [*figures, 0]))
    reason = "/nowhere/python is not there: make bench"
    assert report["machine"]["missing"] == {"sampling_b8": {"peer": reason, "plain": reason}}
    shown = capsys.readouterr().out
    assert "| missing |" in shown and "- sampling_b8: peer transformers missing: /nowhere/python" in shown
    assert "demo_rollout: peer" not in shown


def test_a_failure_of_ours_is_told_and_ends_with_1(monkeypatch, capsys):
    def child(script, work, *_):
        if script == bench.OURS and work.kind != "bounds":
            raise RuntimeError("exit code 1: no such thing")
        return MACHINE["bounds"] | {"value": 1.0, "peak_gb": 1.0}

    monkeypatch.setattr(bench, "child", child)
    assert bench.measure_all(flags("--only", "sampling_b8", "--rounds", "2")) == 1
    assert "ours failed: exit code 1: no such thing" in capsys.readouterr().out


def test_rounds_alternate(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "take", lambda figures, script, *_: seen.append(script))
    bench.measure_row(WORKS[0], flags("--rounds", "2"))
    assert seen == [bench.OURS, bench.PEERS, bench.PEERS] * 2
    seen.clear()
    bench.measure_row(WORKS[-1], flags("--rounds", "2"))
    assert seen == [bench.OURS] * 2


def test_rows_take_medians_and_a_ratio_above_1_is_ours_faster():
    tokens = row(WORKS[0], [300, 100, 200], [50, 40, 1000]).to_json()
    assert (tokens["ours"], tokens["peer"], tokens["ratio"], tokens["ours_peak_gb"]) == (200, 50, 4, 2)
    seconds = row(WORKS[2], [10], [30]).to_json()
    assert (seconds["ratio"], seconds["unit"]) == (3, SECONDS)
    both = row(WORKS[2], [10], [30], (40,)).to_json()
    assert (both["ratio"], both["plain_ratio"], both["plain_peak_gb"]) == (3, 4, 0.4)


@pytest.mark.parametrize("user", [{}, {"MALLOC_ARENA_MAX": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=9"}])
def test_only_a_tuned_peer_has_the_allocator_set(user, monkeypatch):
    """Ours sets it by itself, unless the environment does; a peer with its defaults has glibc's."""
    for name, value in user.items():
        monkeypatch.setenv(name, value)
    seen = []

    def run(command, env, **_):
        sets = {k: v for k, v in env.items() if k.startswith("MALLOC_") or k == "GLIBC_TUNABLES"}
        seen.append((Path(command[1]).name, Work.from_json(command[2]).tuned, sets))
        return subprocess.CompletedProcess(command, 0, stdout='{"value": 1.0, "peak_gb": 1.0}', stderr="")

    monkeypatch.setattr(bench.subprocess, "run", run)
    bench.measure_row(WORKS[0], flags("--rounds", "1"))
    assert seen == [(bench.OURS, True, {}), (bench.PEERS, True, bench.ALLOCATOR), (bench.PEERS, False, {})]


def test_only_the_last_round_of_ours_is_profiled(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "take", lambda figures, script, work, *_: seen.append((script, work.profiled)))
    bench.measure_row(WORKS[0], flags("--rounds", "2"))
    assert [profiled for script, profiled in seen if script == bench.OURS] == [False, True]
    assert not any(profiled for script, profiled in seen if script == bench.PEERS)


def test_tables_hold_every_row():
    rows = [row(work, [100], [50] if work.peer else [], (25,) if work.peer else ()) for work in WORKS]
    text = markdown(rows, MACHINE)
    titles = [line.split(" | ")[0][2:] for line in text.splitlines()[2:] if line.startswith("|")]
    assert titles == [t for w in WORKS for t in [w.title, *([WITH_DEFAULTS] if w.peer else [])]]
    assert "2.00x" in text and "4.00x" in text and "0.50x" in text and "| none |" in text and "10.0 GB/s" in text
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {9}
    report = as_json(rows, MACHINE, [row(scaling_works()[0], [5], [])])
    assert set(report) == {"machine", "rows", "scaling"} and [list(r) for r in report["rows"]] == [KEYS] * len(rows)
    assert set(as_json(rows, MACHINE)) == {"machine", "rows"}
    json.dumps(report, allow_nan=False)
    assert "sampling | 1 | 64 + 64 | gpt2 |" in scaling_markdown([row(scaling_works()[0], [5], [])], MACHINE)


@pytest.mark.parametrize(
    ("index", "ours", "peer", "verdict"),
    [(0, 200, 100, "met"), (0, 199, 100, "missed"), (2, 10, 30, "met"), (2, 10, 29.9, "missed"), (5, 131, 100, "met")],
)
def test_aims_are_met_by_what_was_measured(index, ours, peer, verdict):
    text = markdown([row(WORKS[index], [ours], [peer], (1,))], MACHINE)
    assert re.search(rf"{WORKS[index].name} \d.*x of {WORKS[index].aim:g}x, {verdict}\.", text)


def test_the_footer_tells_products_stolen_time_and_unequal_threads():
    work = row(WORKS[0], [100], [50], (25,))
    calm = markdown([work], MACHINE)
    assert "more than 5%" not in calm and "numbers of threads" not in calm and "Stolen by other guests" in calm
    work.stolen, work.ours.products, work.ours.threads, work.peer.threads = 0.2, 0.75, 2, 1
    text = markdown([work], MACHINE)
    assert "attention's included: sampling_b8 75%." in text and "rows with more than 5%: sampling_b8 20%." in text
    assert "numbers of threads: [1, 2]" in text


def test_stolen_time_is_a_share_of_wall_time_and_cores(monkeypatch, tmp_path, capsys):
    file = tmp_path / "stat"
    file.write_text("cpu  9 9 9 9 9 9 9 100 0 0\ncpu0 1 1\n")
    monkeypatch.setattr(bench_host, "STAT", file)
    monkeypatch.setattr(bench_host.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(bench_host.os, "sysconf", lambda _: 100)
    clock = iter([10.0, 20.0, 20.0])
    monkeypatch.setattr(bench_host.time, "monotonic", lambda: next(clock))
    stolen = bench_host.Stolen()
    assert stolen.share() == 0
    file.write_text("cpu  9 9 9 9 9 9 9 500 0 0\n")  # 4 s more, of 10 s x 4 cores
    assert bench.told(stolen, "a row") == pytest.approx(0.1)
    assert "warning: a row: the host gave 10% of the cores' time" in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "", "cpu 1 2 3 4\n", "cpu a b c d e f g h\n"])
def test_a_system_without_stolen_time_says_nothing(text, monkeypatch, tmp_path):
    if text is not None:
        (tmp_path / "stat").write_text(text)
    monkeypatch.setattr(bench_host, "STAT", tmp_path / "stat")
    assert bench.told(bench_host.Stolen(), "a row") is None
    assert "Stolen" not in markdown([row(WORKS[0], [1], [1])], MACHINE | {"stolen": None})


def test_reports_of_several_hosts_make_one_table(tmp_path, capsys):
    for name, peer, machine in (("one", 50, MACHINE), ("two", 40, MACHINE | {"cpu": "another", "stolen": None})):
        report = as_json([row(WORKS[0], [100], [peer], (25,)), row(WORKS[-1], [1], [])], machine)
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    old = {"machine": {"cpu": "old"}, "rows": [{"work": "sampling_b8", "ratio": 3.0}]}  # of before the plain peers
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert bench.measure_all(flags("--merge", *(str(tmp_path / f"{n}.json") for n in ("one", "two", "old")))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "|  | one | two | old |" and {line.count("|") for line in lines} == {5}
    assert "| processor | a CPU, 2 cores | another, 2 cores | old,  cores |" in lines
    assert "| bf16 matrices | 1 TFLOP/s | 1 TFLOP/s |  |" in lines and "| stolen time | 1.0% |  |  |" in lines
    assert f"| {WORKS[0].title} (aim 2x) | 2.00x (4.00x) | 2.50x (4.00x) | 3.00x |" in lines
    assert len(lines) == 6 + sum(bool(work.aim) for work in WORKS)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"rows": []}', '"machine rows"'])
def test_a_file_that_is_no_report_is_told(text, tmp_path):
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"--merge .*x\.json: .*give files that --json wrote"):
        bench.measure_all(flags("--merge", str(tmp_path / "x.json")))


def test_types_of_products_are_seen_in_every_form():
    w, x = torch.randn(4, 4, requires_grad=True), torch.randn(2, 4)
    for autocast, seen in ((False, {"float32"}), (True, {"bfloat16"})):
        with bench_peers.product_types() as types, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            (x @ w).sum().backward()
            torch.nn.functional.linear(x[None], w, w[0])
            torch.nn.functional.scaled_dot_product_attention(*[w[None, None]] * 3)
            torch.baddbmm(x[None], x[None], w[None])
        assert types.seen == seen


def test_a_tuned_peer_with_products_in_fp32_is_an_error(monkeypatch):
    monkeypatch.setattr(bench_peers, "absence", lambda _: "")
    monkeypatch.setattr(bench_peers.metadata, "version", lambda _: "1")
    result = {"value": 1.0, "types": ["bfloat16", "float32"]}
    monkeypatch.setitem(bench_peers.PEERS, "transformers", lambda _: dict(result))
    with pytest.raises(RuntimeError, match="ran in bfloat16 and float32"):
        bench_peers.measure(WORKS[0])
    assert bench_peers.measure(replace(WORKS[0], tuned=False)).items() >= result.items()


def test_the_table_of_a_gpu_holds_every_preset_and_says_what_did_not_fit():
    works = gpu_works(16.0)
    sizes = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    assert {w.preset for w in works} == {size + variant for size in sizes for variant in ("", "/lora")}
    for all_works in (WORKS, scaling_works(), works):
        assert len({w.name for w in all_works}) == len(all_works)
    assert len(works) == 32 and {w.memory_gb for w in works} == {16.0}
    fits, too_large = row(works[1], [1000.0], []), row(works[2], [], [])
    fits.ours.matrix_flops = 1e14
    too_large.ours.missing = "exit code 1: torch.OutOfMemoryError: CUDA out of memory"
    text = gpu_markdown([fits, too_large], MACHINE)
    assert re.search(r"SFT step \| 1,000 tokens/s \| 1% \| 10.00 GB", text) and "| out of memory |" in text


@pytest.mark.parametrize("preset", ["gpt2", "smollm2-135m", "llama-3.2-1b"])
def test_bounds_count_the_weights_of_a_real_model(preset):
    sizes = bench.sizes_of(preset)
    with torch.device("meta"):
        model = new_model(get_configs(preset))
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "wpe" not in n)
    assert bench_bounds.block_weights(sizes) + bench_bounds.head_weights(sizes) == matrices


def test_bounds_are_those_of_the_weights():
    sizes = bench.sizes_of("gpt2")
    matrices = bench_bounds.block_weights(sizes) + bench_bounds.head_weights(sizes)
    sampling, full = (replace(w, sizes=sizes) for w in (WORKS[0], WORKS[4]))
    lora = replace(full, preset="gpt2/lora")
    hardware = Hardware(bandwidth=2.0 * matrices, matrix_flops=1e12)  # one pass over the weights a second
    assert bench_bounds.bound(sampling, hardware) == pytest.approx(8)
    assert bench_bounds.bound(replace(sampling, kind="rollout"), hardware) is None
    assert 64 < bench_bounds.bound(lora, hardware) < bench_bounds.bound(full, hardware)
    # A step's figure at the bound uses the whole matrix rate; an iteration without its rollout's reads likewise.
    sft = replace(sampling, kind="sft")
    assert bench_bounds.flop_share(sft, bench_bounds.bound(sft, hardware), 1e12) == pytest.approx(1)
    seconds = bench_bounds.bound(full, hardware) - 64
    assert bench_bounds.flop_share(full, seconds, 1e12) == pytest.approx(1)


def test_the_step_flops_of_a_real_model():
    """6 N D of a dense model, N without the position table, plus attention."""
    work = replace(WORKS[0], kind="sft", prompt=1, new=511, sizes=bench.sizes_of("gpt2"))
    assert bench_bounds.flops(work) == pytest.approx(6 * 123_532_032 + 6 * 12 * 768 * 512)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--only", "sampling_b8,nope"], "--only nope: there are sampling_b8"),
        (["--rounds", "0"], "--rounds 0: must be 1 or more"),
        (["--json", "/nowhere/x.json"], "its folder is not there"),
        (["--nanogpt", "/nowhere"], "holds no model.py"),
        (["--device", "cuda", "--scaling"], "--scaling: is measured on the CPU"),
    ],
)
def test_wrong_flags_are_told_before_anything_is_measured(words, complaint, monkeypatch):
    monkeypatch.setattr(bench, "child", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(UserError, match=re.escape(complaint)):
        bench.measure_all(flags(*words))


def test_the_page_on_speed_names_flags_that_there_are():
    commands = re.findall(r"python src/experiments/main\.py -t bench(.*)", (ROOT / "docs" / "speed.md").read_text())
    assert commands
    for command in commands:
        flags(*shlex.split(command.split("#")[0]))


def test_the_peers_share_torch_with_ours():
    pins = [
        dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / f).read_text(), re.M))
        for f in ("requirements.txt", "requirements-bench.txt")
    ]
    assert pins[0]["torch"] == pins[1]["torch"]
    assert {p for packages in bench_peers.PACKAGES.values() for p in packages} == set(pins[1])
