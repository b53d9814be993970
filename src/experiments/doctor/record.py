"""What a run wrote about itself, read back for the doctor: its figures as series, its flags, its samples."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from config.configs import PPOConfig, RMConfig, SFTConfig, stage_defaults
from config.user_error import UserError
from utils.runs.finding import find_folder
from utils.runs.metrics_log import current_tag
from utils.runs.origins import places_of

STAGES = {"sft": "SFT", "rm": "reward model", "ppo": "PPO"}
_CONFIGS = {"sft": SFTConfig, "rm": RMConfig, "ppo": PPOConfig}


@dataclass(frozen=True)
class Series:
    """A figure over a run: steps [N] int64 at which it was logged; values [N] float64, NaN where undefined."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    def kept(self, points: np.ndarray) -> Series:
        """The points for which `points` [N] bool holds."""
        return Series(self.steps[points], self.values[points])

    def finite(self) -> Series:
        """Without the points at which the figure is undefined."""
        return self.kept(np.isfinite(self.values))

    def point(self, at: int) -> tuple[int, float]:
        """Step and value of the point of index `at`."""
        return int(self.steps[at]), float(self.values[at])


_NOTHING = Series(np.zeros(0, dtype=np.int64), np.zeros(0))


@dataclass(frozen=True)
class RunRecord:
    """A run of any stage.

    Attributes:
        folder: the run's folder.
        stage: sft, rm or ppo.
        config: the resolved flags, as in hyperparams.json.
        precision: fp32, bf16 or fp16.
        series: every figure of metrics.jsonl by its tag.
        samples: the rows of samples.jsonl.
        finished: the run has come to its end.
        reward: of a PPO run, the record of its reward model's run; None when that is not there.
    """

    folder: Path
    stage: str
    config: dict[str, Any]
    precision: str
    series: dict[str, Series]
    samples: list[dict[str, Any]]
    finished: bool
    reward: RunRecord | None = None

    def __getitem__(self, tag: str) -> Series:
        """A figure's defined points; empty when it was never logged."""
        return self.series.get(tag, _NOTHING).finite()

    @property
    def last_step(self) -> int:
        """The last step that logged anything."""
        return max(int(s.steps[-1]) for s in self.series.values())

    @property
    def planned_steps(self) -> int:
        """Optimizer steps (PPO: iterations) of the whole run; 0 while no line tells how many an epoch has."""
        limit = int(self.config.get("max_steps") or 0)
        if self.stage == "ppo":
            planned = int(self.config.get("iterations") or 0)
        else:
            epoch = self["train/epoch"]
            planned = round(float(self.config.get("epochs") or 0) * epoch.steps[-1] / epoch.values[-1]) if epoch else 0
        return min(planned or limit, limit or planned)

    def up_to(self, step: int) -> RunRecord:
        """The run as it was when `step` had been logged."""
        cut = {tag: series.kept(series.steps <= step) for tag, series in self.series.items()}
        return replace(
            self, series={tag: series for tag, series in cut.items() if len(series)},
            samples=[row for row in self.samples if row.get("step", 0) <= step],
            finished=self.finished and step >= self.last_step,
        )  # fmt: skip

    def default(self, setting: str) -> float | None:
        """The preset's default of a setting; None when the preset is unknown."""
        try:
            return float(getattr(stage_defaults(_CONFIGS[self.stage], self.config["config"]), setting))
        except (UserError, KeyError):
            return None

    def times_default(self, setting: str) -> float:
        """How many times the preset's default a setting is; 1 when there is nothing to compare with."""
        usual = self.default(setting) if setting in self.config else None
        return float(self.config[setting]) / usual if usual else 1.0


def find_run(argument: str, runs_dir: str) -> Path:
    """The run folder that RUN means: a folder, a checkpoint folder inside one, or a name such as `ppo_demo`.

    UserError where there is none; the message lists the runs there are.
    """
    folder = find_folder(argument, runs_dir, "RUN", _has_figures)
    around = (folder, *folder.resolve().parents[:2])
    return next((f for f in around if (f / "hyperparams.json").is_file()), folder)


def _has_figures(run: Path) -> bool:
    log = run / "metrics.jsonl"
    return log.is_file() and log.stat().st_size > 0


def read_run(folder: Path, runs_dir: str = "runs") -> RunRecord:
    """Read a run's folder. A last line that was cut short, because the run writes or was killed, is left out.

    The reward model's run of a PPO run is read, too; `runs_dir` is where else it is looked for.

    Raises:
        UserError: a file is missing, empty or malformed; the message names it, and the line.
    """
    hyperparams = _hyperparams(folder)
    stage, config = hyperparams.get("stage"), hyperparams.get("config")
    if stage not in STAGES or not isinstance(config, dict):
        raise UserError(f"{folder / 'hyperparams.json'}: names no stage (sft, rm or ppo) or no config")
    series = read_series(folder / "metrics.jsonl")
    if not series:
        raise UserError(f"{folder / 'metrics.jsonl'}: holds no figures yet; wait for the run's first line")
    precision = str(hyperparams.get("runs_on")).rpartition(" ")[2]
    samples = folder / "samples.jsonl"
    return RunRecord(
        folder, stage, config, precision if precision in ("bf16", "fp16") else "fp32", series,
        [row for _, row in _rows(samples)] if samples.is_file() else [], (folder / "final").is_dir(),
        _reward_run(folder, hyperparams, runs_dir) if stage == "ppo" else None,
    )  # fmt: skip


def _hyperparams(folder: Path) -> dict[str, Any]:
    path = folder / "hyperparams.json"
    try:
        hyperparams = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; give the folder of a run of train_sft, train_rm or train_ppo") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(hyperparams, dict):
        raise UserError(f"{path}: holds no JSON object")
    return hyperparams


def read_series(path: Path) -> dict[str, Series]:
    """Every figure of a metrics.jsonl by today's tag, in the order in which they first appear; see `read_run`."""
    points: dict[str, list[tuple[int, float]]] = {}
    for number, row in _rows(path):
        step = row.get("step")
        if not isinstance(step, int):
            raise UserError(f"{path}:{number}: has no whole number as step")
        for tag, value in row.items():
            if tag in ("step", "time"):
                continue
            if not isinstance(value, int | float | None) or isinstance(value, bool):
                raise UserError(f"{path}:{number}: {tag} is no number but {value!r}")
            points.setdefault(current_tag(tag), []).append((step, np.nan if value is None else float(value)))
    columns = {tag: zip(*pairs) for tag, pairs in points.items()}
    return {tag: Series(np.array(steps, dtype=np.int64), np.array(values)) for tag, (steps, values) in columns.items()}


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a .jsonl file with their line numbers."""
    try:
        lines = path.read_bytes().rstrip().split(b"\n")
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; this run has logged nothing, or is no run of ours") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break  # torn: it is being written, or the run was killed while it was
            raise UserError(f"{path}:{number}: is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: is no JSON object")
        rows.append((number, row))
    return rows


def _reward_run(folder: Path, hyperparams: dict[str, Any], runs_dir: str) -> RunRecord | None:
    """The run of the reward model, where it was or, after runs were moved, beside this one or in `runs_dir`."""
    if not hyperparams.get("rm"):
        return None
    for place in places_of(hyperparams["rm"], folder, runs_dir):
        for run in (place, *place.parents[:2]):
            if (run / "metrics.jsonl").is_file():
                try:
                    record = read_run(run, runs_dir)
                except UserError:
                    return None
                return record if record.stage == "rm" else None
    return None
