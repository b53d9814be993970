"""A run that is killed at any moment, in the midst of a save too, ends like the run that was never stopped."""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from killing import Album, Camera, assert_same_run
from setups import new_run

from config.configs import resolved
from models.families import load_checkpoint
from models.lora import freeze_weights, init_adapters, is_adapter
from models.weights.checkpoint import describe
from training.engine.runtime import Runtime
from training.storage.resuming import Resumption, find_resumption, open_run
from utils.runs.finding import find_checkpoint, step_checkpoints
from utils.runs.folder import write_hyperparams
from utils.runs.manifest import fault_of

pytestmark = pytest.mark.slow

ROWS = SimpleNamespace(fingerprint="rows", earlier_fingerprint="")
SETTINGS = dict(save_every=2, eval_every=2, log_every=1, eval_examples=6, batch_size=2, global_batch_size=8, seed=5)


@dataclass
class Stage:
    """How one stage is built, from scratch or from a checkpoint."""

    name: str
    make: Callable[..., object]
    lora: bool
    settings: dict

    def trainer(self, run: Path, resumption: Resumption | None = None):
        runtime = Runtime("cpu", "fp32", 5)
        state = resumption and resumption.state
        return self.make(self, resumption and resumption.checkpoint, runtime, run=run, state=state, **self.settings)

    def start(self, run: Path):
        trainer = self.trainer(run)
        model = trainer.saver.models[""]
        extra = {"data": "rows", "sft": "", "runs_on": trainer.runtime.describe()}
        write_hyperparams(run, self.name, resolved(trainer.config), resolved(model.config), extra)
        return trainer

    def go_on(self, run: Path, config):
        """The trainer that the script would make; before the first checkpoint one that starts again."""
        if not step_checkpoints(run):
            shutil.rmtree(run), run.mkdir()
            return self.start(run)
        resumption = find_resumption(self.name, replace(config, resume=str(run)))
        open_run(self.name, config, None, Runtime("cpu", "fp32", 5), resumption, ROWS, {})
        return self.trainer(run, resumption)


@pytest.fixture
def stage(request, make_model, sft_trainer, rm_trainer, ppo_trainer, monkeypatch) -> Stage:
    name, lora, settings = request.param
    monkeypatch.setattr("os.fsync", lambda handle: None)  # the order is tested elsewhere; waiting is not needed here
    options = {"lora_rank": 2} if lora else {}
    noise = {"lora_dropout": 0.1} if lora else {"dropout": 0.1}

    def model(role: str, folder: Path | None, **more):
        made = make_model(role, std=0.1, **options, **more) if folder is None else load_checkpoint(folder, role)
        if lora and folder is None:
            init_adapters(made)
        freeze_weights(made, "lora" if lora else "none")
        return made

    def reference():
        base = {k: v for k, v in model("actor", None).state_dict().items() if not is_adapter(k)}
        plain = make_model()
        plain.load_state_dict(base)
        return plain

    def make(self, folder, runtime, **rest):
        if name == "sft":
            return sft_trainer(model=model("lm", folder, **noise), on=runtime, **rest)
        if name == "rm":
            return rm_trainer(model=model("reward", folder), on=runtime, **rest)
        critic = folder and folder / "critic"
        actor, values = model("actor", folder), model("critic", critic)
        return ppo_trainer(actor=actor, critic=values, reference=reference(), on=runtime, **rest)

    return Stage(name, make, lora, {**SETTINGS, **settings})


CASES = [
    pytest.param(("sft", False, dict(epochs=2)), id="sft, 2 epochs"),
    pytest.param(("sft", True, dict(epochs=1, max_steps=3)), id="sft, LoRA, 1 epoch"),
    pytest.param(("rm", False, dict(epochs=1)), id="rm, 1 epoch"),
    pytest.param(("rm", True, dict(epochs=2, max_steps=5)), id="rm, LoRA, 2 epochs"),
    pytest.param(("ppo", False, dict(iterations=4, kl_target=0.1, kl_horizon=20)), id="ppo"),
    pytest.param(("ppo", True, dict(iterations=3, save_every=1)), id="ppo, LoRA"),
]


# Of a LLaMA, what its checkpoints have that GPT-2's have not: a table of its own in the actor and none in the critic.
EACH = [pytest.param("gpt2", *case.values, id=case.id) for case in CASES]
EACH += [pytest.param("llama", *case.values, id=f"llama, {case.id}") for case in CASES[-2:]]


@pytest.mark.parametrize(("family", "stage"), EACH, indirect=True)
def test_killed_at_any_moment(stage: Stage, tmp_path) -> None:
    """Every operation of every save and every line of the logs is a moment. At each the newest checkpoint and best/ are
    whole, old or new; from some of them, drawn at random, the run is gone on with to its end."""
    whole = stage.start(new_run(tmp_path))
    assert whole.fit() == 0
    run = new_run(tmp_path)
    trainer = stage.start(run)
    album = Album(run, tmp_path / "album")
    trainer.saver.disk = Camera(album.look)
    log = trainer.log.log
    trainer.log.log = lambda step, metrics: (log(step, metrics), album.look(f"logged {step}"))[0]
    assert trainer.fit() == 0
    assert_same_run(whole.run, run)
    assert len(album.moments) > 80
    saved, best = 0, 0
    for what, copy in album.moments:
        steps = [p for p in step_checkpoints(copy) if fault_of(p) is None]
        assert steps == step_checkpoints(copy), what  # nothing torn has a checkpoint's name
        newest = int(steps[-1].name[5:]) if steps else 0
        assert newest >= saved, what  # saved once, saved for good
        saved = newest
        if best or (copy / "best").exists():
            found = find_checkpoint(str(copy / "best"), str(tmp_path), "-p")
            assert fault_of(found) is None, what
            assert describe(found)["step"] >= best, what
            best = describe(found)["step"]
    chosen = random.Random(0).sample(album.moments, 5) + [album.moments[-1]]
    for what, copy in chosen:
        try:
            assert stage.go_on(copy, trainer.config).fit() == 0, what
        except SystemExit as finished:
            assert finished.code == 0 and (copy / "final").exists(), what
        assert_same_run(whole.run, copy)


@pytest.mark.parametrize("stage", CASES[:1], indirect=True)
def test_killed_again_and_again(stage: Stage, tmp_path) -> None:
    """Each life ends in the midst of a save or between two lines of the log; the last one finishes."""
    whole = stage.start(new_run(tmp_path))
    assert whole.fit() == 0
    run, chance = new_run(tmp_path), random.Random(1)
    trainer = stage.start(run)
    config = trainer.config
    for life in range(6):
        album = Album(run, tmp_path / f"album{life}")
        trainer.saver.disk = Camera(album.look)
        assert trainer.fit() == 0
        # Early moments, or the first life would do all the work.
        run = chance.choice(album.moments[: max(1, len(album.moments) // 2)])[1]
        trainer = stage.go_on(run, config)
    assert trainer.fit() == 0
    assert_same_run(whole.run, run)
