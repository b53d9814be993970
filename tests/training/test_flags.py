"""A flag that nothing reads is a flag that the script ignores: who reads the configuration of a real run."""

import sys
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
from scripts import call

import training
from config.configs import PPOConfig, RMConfig, RunConfig, SFTConfig
from training import loop

pytestmark = pytest.mark.slow

SRC = Path(training.__file__).resolve().parents[1]
# The plan only foretells: what it alone reads has no influence on the run.
PLANNING = ("plan.py", "sources.py", "preflight.py", "device.py")
# Flags of a run in which no option keeps another from being looked at.
STAGES = {
    SFTConfig: ("sft", ""),
    RMConfig: ("rm", "-p sft_flags"),
    PPOConfig: ("ppo", "-a sft_flags -c rm_flags --kl-target 1 --reward-fn REWARD --reward-fn-weight 0.5"),
}
# --strategy offers one device, so there is nothing to decide; --plan-gb is the plan's; PPO logs every iteration, as the
# help of --log-every says.
UNREAD = {
    SFTConfig: {"strategy", "plan_gb"},
    RMConfig: {"strategy", "plan_gb"},
    PPOConfig: {"strategy", "plan_gb", "log_every"},
}


def record_reads(monkeypatch, cls: type) -> dict[str, set[str]]:
    """Filled from now on: {field of a configuration of this class: files of src/ that read it from one}.

    Writing all fields down at once is not reading one; nor is checking their range, which config/ does.
    """
    read, names = defaultdict(set), {f.name for f in fields(cls)}

    def watched(self, name: str):
        if name in names and type(self) is cls:
            file = Path(sys._getframe(1).f_code.co_filename)
            if SRC in file.parents and file.parent.name != "config":
                read[name].add(file.name)
        return object.__getattribute__(self, name)

    monkeypatch.setattr(RunConfig, "__getattribute__", watched, raising=False)
    return read


@pytest.fixture(scope="module")
def reads(tmp_path_factory):
    """{stage: what its script read of its configuration}, from a run of each."""
    runs, found = tmp_path_factory.mktemp("runs"), {}
    (runs / "reward.py").write_text("def score(prompts, responses):\n    return [0.5] * len(responses)\n")
    for cls, (stage, flags) in STAGES.items():
        with pytest.MonkeyPatch.context() as patch:
            found[cls] = record_reads(patch, cls)
            flags = flags.replace("REWARD", f"{runs / 'reward.py'}:score")
            result = call(stage, f"-n flags {flags}", runs)
            assert result.code == 0, result.err
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_is_read_by_the_stage_that_has_it(reads, stage) -> None:
    unread = {f.name for f in fields(stage) if not reads[stage][f.name] - set(PLANNING)}
    assert unread == UNREAD[stage]


def test_only_reads_of_the_configuration_in_src_count(monkeypatch) -> None:
    """The recording itself: checks of a range, copies, comparisons and what tests look at do not count."""

    @dataclass(frozen=True, kw_only=True)
    class WithOneMore(SFTConfig):
        sampler: str = "an attribute of this name is read from trainers, too"

    reads = record_reads(monkeypatch, WithOneMore)
    config = WithOneMore()
    assert config.sampler and repr(config) and config == replace(config) and not reads
    loop.steps_per_epoch([1, 2, 3], config)
    assert reads == {"global_batch_size": {"loop.py"}}
