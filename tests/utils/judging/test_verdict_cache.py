"""Verdicts on disk: found again, whole under kills and two writers, and only the clear ones."""

import json
import multiprocessing
from pathlib import Path

import pytest

from config.user_error import UserError
from utils.judging.pairwise import Question, Verdict
from utils.judging.verdict_cache import VerdictCache

QUESTION = Question("p", "a", "b")
JUDGE = ["openai", "http://x", "model", "template"]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "folder" / "cache.jsonl"


def test_a_verdict_is_found_again_at_once_and_later(path):
    cache = VerdictCache(path, JUDGE)
    assert cache.get(QUESTION) is None and not path.exists()
    cache.add(QUESTION, Verdict.SECOND)
    assert cache.get(QUESTION) is VerdictCache(path, JUDGE).get(QUESTION) is Verdict.SECOND


@pytest.mark.parametrize("verdict", [Verdict.UNPARSED, Verdict.FAILED])
def test_what_is_not_clear_is_not_kept(path, verdict):
    cache = VerdictCache(path, JUDGE)
    cache.add(QUESTION, verdict)
    assert cache.get(QUESTION) is None and not path.exists()


def test_nothing_else_that_a_verdict_depends_on_may_differ(path):
    VerdictCache(path, JUDGE).add(QUESTION, Verdict.FIRST)
    for i in range(len(JUDGE)):
        other = [*JUDGE[:i], "other", *JUDGE[i + 1 :]]
        assert VerdictCache(path, other).get(QUESTION) is None
    cache = VerdictCache(path, JUDGE)
    for question in (
        Question("q", "a", "b"),
        Question("p", "b", "a"),
        Question("pa", "", "b"),
        Question("p", "a", "c"),
    ):
        assert cache.get(question) is None


def test_a_line_cut_short_is_passed_over_and_spoils_no_other(path):
    cache = VerdictCache(path, JUDGE)
    cache.add(QUESTION, Verdict.FIRST)
    cache.add(Question("q", "a", "b"), Verdict.TIE)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        path.write_bytes(whole[:cut])
        again = VerdictCache(path, JUDGE)
        assert again.get(QUESTION) is Verdict.FIRST and again.get(Question("q", "a", "b")) is None
        again.add(Question("r", "a", "b"), Verdict.SECOND)
        after = VerdictCache(path, JUDGE)
        assert after.get(QUESTION) is Verdict.FIRST and after.get(Question("r", "a", "b")) is Verdict.SECOND


@pytest.mark.parametrize(
    "line", ["", "[]", "null", "3", '{"key": 3, "verdict": "first"}', '{"verdict": "first"}', "\xff", '{"key": "K"}',
             '{"key": "K", "verdict": "unparsed"}', '{"key": "K", "verdict": "A"}']
)  # fmt: skip
def test_lines_that_mean_nothing_are_passed_over(path, line):
    cache = VerdictCache(path, JUDGE)
    cache.add(QUESTION, Verdict.FIRST)
    with path.open("ab") as file:
        file.write(line.replace("K", cache.key(Question("q", "a", "b"))).encode("latin-1") + b"\n")
    cache.add(Question("r", "a", "b"), Verdict.TIE)
    again = VerdictCache(path, JUDGE)
    assert [again.get(Question(p, "a", "b")) for p in "pqr"] == [Verdict.FIRST, None, Verdict.TIE]


def test_the_first_of_two_verdicts_counts(path):
    one, two = VerdictCache(path, JUDGE), VerdictCache(path, JUDGE)
    one.add(QUESTION, Verdict.FIRST)
    two.add(QUESTION, Verdict.SECOND)
    assert VerdictCache(path, JUDGE).get(QUESTION) is Verdict.FIRST


def test_refresh_reads_what_others_added(path):
    one, two = VerdictCache(path, JUDGE), VerdictCache(path, JUDGE)
    for prompt in "pqr":
        two.add(Question(prompt, "a", "b"), Verdict.TIE)
        assert one.get(Question(prompt, "a", "b")) is None
        one.refresh()
        assert one.get(Question(prompt, "a", "b")) is Verdict.TIE


def _write(path: Path, name: str) -> None:
    cache = VerdictCache(path, JUDGE)
    for i in range(60):
        cache.add(Question(f"{name} {i}", "a" * 5000, "b"), Verdict.FIRST)


def test_two_processes_may_write(path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(path, name)) for name in ("one", "two")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert [writer.exitcode for writer in writers] == [0, 0]
    lines = path.read_text().splitlines()
    assert len(lines) == 120 and all(json.loads(line)["verdict"] == "first" for line in lines)
    cache = VerdictCache(path, JUDGE)
    assert all(cache.get(Question(f"{n} {i}", "a" * 5000, "b")) for n in ("one", "two") for i in range(60))


def test_a_place_that_cannot_be_used_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        VerdictCache(tmp_path, JUDGE)
    (tmp_path / "file").write_text("")
    cache = VerdictCache(tmp_path / "new" / "cache.jsonl", JUDGE)
    (tmp_path / "new").write_text("in the way")
    with pytest.raises(UserError, match="cannot keep"):
        cache.add(QUESTION, Verdict.FIRST)
