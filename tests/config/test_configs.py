"""Presets, validation and the command line."""

import contextlib
import dataclasses
import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from config.command_line import config_of_record, parse_cli
from config.configs import PPOConfig, RMConfig, SFTConfig, resolved, stage_defaults
from config.model_configs import PRESETS, GPTConfig, LlamaConfig, get_configs, model_config_from_dict
from config.user_error import UserError

STAGES = [SFTConfig, RMConfig, PPOConfig]

# ---------------------------------------------------------------------------------------------------------------------
# Model presets
# ---------------------------------------------------------------------------------------------------------------------

# Radford et al. 2019 and the released checkpoints: layers, heads, channels, parameters.
GPT2 = {
    "gpt2": (12, 12, 768, 124_439_808),
    "gpt2-medium": (24, 16, 1024, 354_823_168),
    "gpt2-large": (36, 20, 1280, 774_030_080),
    "gpt2-xl": (48, 25, 1600, 1_557_611_200),
}


@pytest.mark.parametrize("size", GPT2)
@pytest.mark.parametrize("variant", ["", "/dropout", "/lora"])
def test_sizes_of_gpt2(size, variant):
    config = get_configs(size + variant)
    layers, heads, d, parameters = GPT2[size]
    assert (config.n_layer, config.n_head, config.n_embd) == (layers, heads, d)
    assert (config.block_size, config.vocab_size, config.embedding_rows) == (1024, 50257, 50257)
    assert config.head_dim == 64
    assert (50257 + 1024) * d + layers * (12 * d * d + 13 * d) + 2 * d == parameters
    assert (config.name, config.stem, config.family) == (size + variant, size, "gpt2")


@pytest.mark.parametrize("name", PRESETS)
def test_variants(name):
    config = get_configs(name)
    variant = name.partition("/")[2]
    assert config.dropout == (0.2 if variant == "dropout" else 0.0)
    assert (config.lora_rank > 0) == (variant == "lora")
    assert config.lora_dropout == 0.0
    plain = get_configs(config.stem)
    assert config.same_sizes(plain)
    assert plain.with_options(config) == config


def test_lora_of_gpt2():
    config = get_configs("gpt2/lora")
    assert (config.lora_rank, config.lora_alpha, config.lora_scaling) == (8, 16.0, 2.0)
    assert get_configs("gpt2").lora_scaling == 0.0


# As in the config.json of each on the hub: layers, heads, heads of keys, channels, inner channels, vocabulary, tied,
# and the parameters that its page there gives.
LLAMA = {
    "smollm2-135m": (30, 9, 3, 576, 1536, 49152, True, 134_515_008),
    "smollm2-360m": (32, 15, 5, 960, 2560, 49152, True, 361_821_120),
    "smollm2-1.7b": (24, 32, 32, 2048, 8192, 49152, True, 1_711_376_384),
    "tinyllama-1.1b": (22, 32, 4, 2048, 5632, 32000, False, 1_100_048_384),
    "llama-3.2-1b": (16, 32, 8, 2048, 8192, 128256, True, 1_235_814_400),
}


@pytest.mark.parametrize("size", LLAMA)
@pytest.mark.parametrize("variant", ["", "/lora"])
def test_sizes_of_llama(size, variant):
    c = get_configs(size + variant)
    *sizes, parameters = LLAMA[size]
    assert [c.n_layer, c.n_head, c.n_kv_head, c.n_embd, c.n_inner, c.vocab_size, c.tied] == sizes
    assert (c.head_dim, c.stem, c.family) == (64, size, "llama")
    tables = c.vocab_size * c.n_embd * (1 if c.tied else 2)
    block = 2 * c.n_embd * 64 * (c.n_head + c.n_kv_head) + 3 * c.n_embd * c.n_inner + 2 * c.n_embd
    assert tables + c.n_layer * block + c.n_embd == parameters


@pytest.mark.parametrize(
    "values",
    [
        {"n_head": 4, "n_kv_head": 3}, {"n_kv_head": -1}, {"head_dim": 7}, {"n_inner": -4}, {"rms_norm_eps": 0.0},
        {"rope_theta": -1.0}, {"rope_type": "yarn"}, {"rope_factor": 0.0}, {"rope_low_freq_factor": 4.0},
        {"dropout": 0.1},
    ],
)  # fmt: skip
def test_impossible_llamas_are_refused(values):
    with pytest.raises(UserError, match=next(reversed(values))):
        LlamaConfig(**values)


def test_a_model_of_before_families_is_a_gpt2():
    values = resolved(get_configs("gpt2"))
    del values["family"]
    assert model_config_from_dict(values, "model.json") == get_configs("gpt2")


@pytest.mark.parametrize("family", ["mamba", None, 3])
def test_another_family_is_named(family):
    with pytest.raises(UserError, match="model.json: .*family .*this code knows gpt2, llama"):
        model_config_from_dict(resolved(get_configs("gpt2")) | {"family": family}, "model.json")


def test_there_are_presets_of_both_families():
    assert len(PRESETS) == 27 and "gpt2-nano/lora" in PRESETS and "llama-nano/lora" in PRESETS
    assert not any(name.endswith("/dropout") for name in PRESETS if get_configs(name).family == "llama")
    nano = get_configs("gpt2-nano")
    assert (nano.n_layer, nano.n_embd) == (3, 128) and nano.init_std > 0.02


@pytest.mark.parametrize("name", ["gpt3", "gpt2/", "gpt2-medium/lora/dropout", "", "GPT2", "gpt2-medium/LoRA"])
def test_an_unknown_preset_lists_all(name):
    with pytest.raises(UserError) as caught:
        get_configs(name)
    assert all(part in str(caught.value) for preset in PRESETS for part in preset.split("/"))
    assert "--config" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"n_layer": 0}, {"n_head": 0}, {"n_embd": -8}, {"block_size": 0}, {"vocab_size": 0}, {"n_head": 5},
        {"lora_rank": -1}, {"lora_rank": 4, "lora_alpha": 0.0}, {"lora_alpha": float("nan")}, {"dropout": 1.0},
        {"dropout": -0.1}, {"lora_dropout": 1.0}, {"embedding_rows": 100}, {"init_std": 0.0},
        {"layer_norm_eps": float("inf")},
    ],
)  # fmt: skip
def test_impossible_models_are_refused(values):
    with pytest.raises(UserError, match=next(reversed(values))):
        GPTConfig(**values)


def test_configs_are_frozen():
    for config in (get_configs("gpt2"), SFTConfig(), RMConfig(), PPOConfig()):
        with pytest.raises(FrozenInstanceError):
            config.name = "other"


@pytest.mark.parametrize("name", [*PRESETS, "somewhere/tiny"])
def test_a_model_config_survives_json(name):
    preset = get_configs(name if name in PRESETS else "gpt2/lora")
    config = replace(preset, name=name, embedding_rows=200000)
    assert model_config_from_dict(json.loads(json.dumps(resolved(config))), "model.json") == config


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v.pop("n_head"), "lacks .*n_head"),
        (lambda v: v.update(rope=True), "unknown keys .*rope"),
        (lambda v: v.update(n_head=7), "n_embd 768 is not a multiple of n_head 7"),
        (lambda v: v.update(n_layer="12"), "n_layer is '12', expected int"),
        (lambda v: v.update(n_layer=12.0), "n_layer is 12.0, expected int"),
        (lambda v: v.update(n_layer=True), "n_layer is True, expected int"),
        (lambda v: v.update(dropout=False), "dropout is False, expected float"),
        (lambda v: v.update(dropout=None), "dropout is None, expected float"),
        (lambda v: v.update(activation_checkpointing=1), "activation_checkpointing is 1, expected bool"),
        (lambda v: v.update(name=3), "name is 3, expected str"),
    ],
)
def test_a_wrong_model_config_names_its_file(change, message):
    values = resolved(get_configs("gpt2"))
    change(values)
    with pytest.raises(UserError, match=f"^runs/a/model.json: .*{message}"):
        model_config_from_dict(values, "runs/a/model.json")


def test_whole_numbers_are_floats_too():
    values = resolved(get_configs("gpt2/lora")) | {"lora_alpha": 16, "dropout": 0}
    assert model_config_from_dict(values, "") == get_configs("gpt2/lora")


# ---------------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_stage_has_a_recipe_for_every_preset(stage, preset):
    defaults = stage_defaults(stage, preset)
    assert type(defaults) is stage and defaults.config == preset
    assert parse_cli(stage, ["--config", preset]) == defaults
    assert parse_cli(stage, [f"--config={preset}", "--seed", "3"]) == replace(defaults, seed=3)


@pytest.mark.parametrize("stage", STAGES)
def test_larger_models_and_full_training_get_smaller_steps(stage):
    lr = {preset: stage_defaults(stage, preset).lr for preset in PRESETS}
    assert lr["gpt2"] < lr["gpt2/lora"] and lr["gpt2"] < lr["gpt2-nano"]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_reward_model_is_normalised_at_ppos_sampler(preset):
    rm, ppo = stage_defaults(RMConfig, preset), stage_defaults(PPOConfig, preset)
    assert (rm.temperature, rm.response_length) == (ppo.temperature, ppo.response_length)
    assert parse_cli(RMConfig, ["--config", preset, "--temperature", "0.9"]).temperature == 0.9


@pytest.mark.parametrize("stage", STAGES)
def test_resolved_is_enough_to_rebuild(stage):
    config = replace(stage_defaults(stage, "gpt2-medium/lora"), seed=7, max_length=512)
    assert stage(**json.loads(json.dumps(resolved(config)))) == config


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rows", [1, 2, 5, 31, 32, 33, 64, 129, 256, 10000])
@pytest.mark.parametrize("more", [[], ["--tokens-per-micro-batch", "512"], ["--global-batch-size", "7"]], ids=str)
def test_no_pass_is_larger_than_a_step_and_no_step_grows(stage, rows, more, capsys):
    """--global-batch-size is part of the recipe, -b is not."""
    step = 7 if "7" in more else stage_defaults(stage, "gpt2").global_batch_size
    for flag in (["-b", str(rows)], [f"--batch-size={rows}"]):
        config = parse_cli(stage, ["--config", "gpt2", *flag, *more])
        assert (config.batch_size, config.global_batch_size) == (min(rows, step), step)
        assert config.tokens_per_micro_batch == (512 if "512" in more else 0)
        told = f"--batch-size {rows}: a step has --global-batch-size {step}, so passes are of {step}\n"
        assert capsys.readouterr().out == (told if rows > step else "")


@pytest.mark.parametrize("stage", STAGES)
def test_a_smaller_step_has_smaller_passes_without_a_word(stage, capsys):
    config = parse_cli(stage, ["--global-batch-size", "3"])
    assert (config.batch_size, config.global_batch_size) == (3, 3) and not capsys.readouterr().out


BAD = [
    (SFTConfig, ["-b", "0"], "--batch-size 0"),
    (SFTConfig, ["-b", "two"], "--batch-size.*'two'"),
    (SFTConfig, ["--lr", "-1e-4"], "--lr"),
    (SFTConfig, ["--lr", "nan"], "--lr nan"),
    (SFTConfig, ["--lr", "inf"], "--lr inf"),
    (SFTConfig, ["--lr"], "--lr"),
    (SFTConfig, ["--weight-decay", "-1"], "--weight-decay"),
    (SFTConfig, ["--weight-decay", "nan"], "--weight-decay"),
    (SFTConfig, ["--max-grad-norm", "0"], "--max-grad-norm"),
    (SFTConfig, ["--max-steps", "-1"], "--max-steps"),
    (SFTConfig, ["--eval-every", "0"], "--eval-every"),
    (SFTConfig, ["--keep", "0"], "--keep"),
    (SFTConfig, ["--seed", "-1"], "--seed"),
    (SFTConfig, ["--seed", str(2**32)], "--seed"),
    (SFTConfig, ["--seed", "1.5"], "--seed"),
    (SFTConfig, ["--epochs", "0"], "--epochs"),
    (SFTConfig, ["--warmup-steps", "-1"], "--warmup-steps"),
    (SFTConfig, ["--min-lr-ratio", "1.1"], "--min-lr-ratio"),
    (SFTConfig, ["--beta2", "1"], "--beta2"),
    (SFTConfig, ["--sample-tokens", "0"], "--sample-tokens"),
    (SFTConfig, ["--device", "tpu"], "tpu.*--device.*cuda"),
    (SFTConfig, ["--dtype", "fp8"], "fp8.*--dtype.*bf16"),
    (SFTConfig, ["-s", "ddpp"], "ddpp.*naive"),
    (SFTConfig, ["--freeze", "first_block"], "first_block.*last_block"),
    (SFTConfig, ["-n", "a/b"], "--name"),
    (SFTConfig, ["-n", "a b"], "--name"),
    (SFTConfig, ["-n", "a\nb"], "--name"),
    (SFTConfig, ["-n", ""], "--name"),
    (SFTConfig, ["--config", "gpt5"], "--config gpt5.*gpt2-medium.*/lora"),
    (SFTConfig, ["--config"], "--config"),
    (SFTConfig, ["stray"], "stray"),
    (SFTConfig, ["--skip-bad-rows", "maybe"], "maybe"),
    (RMConfig, ["--epochs", "0"], "--epochs"),
    (RMConfig, ["--normalise-prompts", "2"], "--normalise-prompts"),
    (RMConfig, ["--temperature", "-1"], "--temperature"),
    (RMConfig, ["--response-length", "-1"], "--response-length"),
    (RMConfig, ["--min-lr-ratio", "-0.1"], "--min-lr-ratio"),
    (PPOConfig, ["--temperature", "0"], "--temperature"),
    (PPOConfig, ["--critic-lr", "0"], "--critic-lr"),
    (PPOConfig, ["--gamma", "1.01"], "--gamma"),
    (PPOConfig, ["--lam", "-0.1"], "--lam"),
    (PPOConfig, ["--clip-eps", "0"], "--clip-eps"),
    (PPOConfig, ["--kl-coef", "-0.1"], "--kl-coef"),
    (PPOConfig, ["--kl-coef", "inf"], "--kl-coef"),
    (PPOConfig, ["--kl-coef", "0", "--kl-target", "6"], "--kl-target"),
    (PPOConfig, ["--ppo-epochs", "0"], "--ppo-epochs"),
    (PPOConfig, ["--minibatches", "0"], "--minibatches"),
    (PPOConfig, ["--minibatches", "1000"], "--minibatches 1000.*--global-batch-size"),
    (PPOConfig, ["--response-length", "0"], "--response-length"),
    (PPOConfig, ["--kl-horizon", "0"], "--kl-horizon"),
    (PPOConfig, ["--reward-fn-weight", "0.5"], "--reward-fn-weight.*--reward-fn"),
    (PPOConfig, ["--reward-fn", "r.py:f", "--reward-fn-weight", "nan"], "--reward-fn-weight"),
]


@pytest.mark.parametrize(
    "stage, argv, message", BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else None
)
def test_bad_values_are_refused_in_one_line(stage, argv, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_cli(stage, argv)
    line = str(caught.value)
    assert "\n" not in line and not set(line) & set("─│╭╮╰╯┄") and len(line) < 400


@pytest.mark.parametrize("stage", STAGES)
def test_every_number_has_a_range(stage):
    for name, default in resolved(stage()).items():
        if isinstance(default, int | float) and not isinstance(default, bool):
            wrong = float("nan") if isinstance(default, float) else -1
            with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} {wrong}: must be "):
                stage(**{name: wrong})


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_an_unknown_flag_lists_the_flags(stage):
    with pytest.raises(UserError, match="--learning-rate: no such flag") as caught:
        parse_cli(stage, ["--learning-rate", "1e-4"])
    line = str(caught.value)
    assert "\n" not in line
    for field in fields(stage):
        assert "--" + field.name.replace("_", "-") in line
    assert all(short in line for short in ("-n", "-s", "-b"))


def test_a_misspelt_flag_gets_a_hint():
    for wrong, right in [
        ("--batchsize", "--batch-size"),
        ("--golbal-batch-size=4", "--global-batch-size"),
        ("--confg", "--config"),
    ]:
        with pytest.raises(UserError, match=f"did you mean {right}"):
            parse_cli(SFTConfig, [wrong, "4"])


@pytest.mark.parametrize("stage, flag", [(SFTConfig, "-a"), (RMConfig, "-c"), (PPOConfig, "-p"), (PPOConfig, "-x")])
def test_short_flags_of_another_stage_are_unknown(stage, flag):
    with pytest.raises(UserError, match=f"{flag}: no such flag"):
        parse_cli(stage, [flag, "value"])


@pytest.mark.parametrize("stage", STAGES)
def test_help_describes_every_field_and_exits_0(stage, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_cli(stage, ["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for field in fields(stage):
        assert "--" + field.name.replace("_", "-") in shown.out


@pytest.mark.parametrize("preset", ["gpt2-nano", "gpt2-medium/lora"])
def test_help_shows_the_presets_defaults(preset, capsys):
    with pytest.raises(SystemExit):
        parse_cli(PPOConfig, ["--config", preset, "--help"])
    defaults = stage_defaults(PPOConfig, preset)
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"(default: {preset})" in out
    assert f"Peak learning rate of the critic; --lr is the actor's. (default: {defaults.critic_lr})" in out


def test_the_users_commands_parse():
    def parse(stage, line):
        return parse_cli(stage, line.split())

    sft = parse(SFTConfig, "-n hh -b 2 -p huggingface -s naive --config gpt2-medium/dropout --dataset hh")
    assert (sft.name, sft.batch_size, sft.pretrain, sft.strategy) == ("hh", 2, "huggingface", "naive")
    assert (sft.config, sft.dataset) == ("gpt2-medium/dropout", "hh")
    rm = parse(RMConfig, "-n hh -b 2 -p sft_hh -s naive --config gpt2-medium/lora --dataset rm-static")
    assert (rm.name, rm.batch_size, rm.pretrain, rm.config) == ("hh", 2, "sft_hh", "gpt2-medium/lora")
    ppo = parse(PPOConfig, "-n hh -b 2 -a sft_hh -c rm_hh -s naive --config gpt2-medium/lora --dataset rm-static")
    assert (ppo.actor, ppo.critic, ppo.batch_size, ppo.dataset) == ("sft_hh", "rm_hh", 2, "rm-static")
    common = parse(SFTConfig, "--max-steps 5 --device cpu --dtype bf16 --runs-dir /tmp/r --resume auto --skip-bad-rows")
    assert (common.max_steps, common.device, common.dtype) == (5, "cpu", "bf16")
    assert (common.runs_dir, common.resume, common.skip_bad_rows) == ("/tmp/r", "auto", True)


def test_the_offline_defaults():
    sft = parse_cli(SFTConfig, [])
    assert (sft.config, sft.dataset, sft.pretrain) == ("gpt2-nano", "demo", "scratch")
    assert parse_cli(RMConfig, []).dataset == parse_cli(PPOConfig, []).dataset == "demo"


def test_underscores_equal_signs_and_repetition():
    config = parse_cli(SFTConfig, ["--batch_size=3", "--global-batch-size=6", "--lr", "1e-4", "--lr=2e-4"])
    assert (config.batch_size, config.global_batch_size, config.lr) == (3, 6, 2e-4)


@pytest.mark.parametrize("words, given", [
    (["-n", "a", "-b8", "--lr=2e-4", "--max_steps", "3"],
     {"name": "a", "batch_size": "8", "lr": "2e-4", "max_steps": "3"}),
    (["-n=a", "--name", "b", "--lr", "-1"], {"name": "b", "lr": "-1"}),
    (["--skip-bad-rows", "--resume="], {"skip_bad_rows": "--resume=", "resume": ""}),
])  # fmt: skip
def test_a_run_to_go_on_with_is_told_what_is_given(words, given):
    seen = []

    def recorded(stage, flags):
        seen.append((stage, flags))

    with contextlib.suppress(UserError):
        parse_cli(SFTConfig, [*words, "--resume", "r"], recorded)
    assert seen == [(SFTConfig, given | {"resume": "r"})]
    with contextlib.suppress(UserError):
        parse_cli(SFTConfig, words, recorded)  # nothing goes on
    assert len(seen) == 1


@pytest.mark.parametrize("stage", STAGES)
def test_a_recorded_run_gives_the_defaults(stage):
    then = replace(stage_defaults(stage, "gpt2/lora"), lr=0.25, seed=7, name="mine", batch_size=2, skip_bad_rows=True)
    defaults = config_of_record(stage, json.loads(json.dumps(resolved(then))), "r")
    assert defaults == then
    assert parse_cli(stage, ["--resume", "r"], lambda *_: defaults) == replace(then, resume="r")
    config = parse_cli(stage, ["--resume", "r", "--seed", "8", "--no-skip-bad-rows"], lambda *_: defaults)
    assert config == replace(then, resume="r", seed=8, skip_bad_rows=False)
    assert parse_cli(stage, ["--resume", "r", "-b", "1"], lambda *_: defaults).tokens_per_micro_batch == 0
    assert parse_cli(stage, ["--resume", "r"], lambda *_: None) == replace(stage(), resume="r", **{
        field: value for field, value in resolved(stage_defaults(stage, stage.config)).items() if field != "resume"
    })  # fmt: skip


def test_a_record_of_another_day():
    values = {"lr": 1, "name": "it's --odd", "tokenizer": "", "no_longer": 3}
    with pytest.raises(UserError, match="^r: --name"):
        config_of_record(SFTConfig, values, "r")
    config = config_of_record(SFTConfig, values | {"name": "x", "dataset": "--a b=c d.jsonl", "pretrain": "-x"}, "r")
    expected = dict(lr=1.0, name="x", tokenizer="", dataset="--a b=c d.jsonl", pretrain="-x")
    assert config == replace(stage_defaults(SFTConfig, "gpt2-nano"), **expected)


def test_the_last_config_decides_the_recipe():
    assert parse_cli(SFTConfig, ["--config", "gpt2-nano", "--config", "gpt2"]) == stage_defaults(SFTConfig, "gpt2")


def test_arguments_come_from_the_command_line_by_default(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_sft.py", "-n", "mine"])
    assert parse_cli(SFTConfig).name == "mine"


@pytest.mark.parametrize("config", [GPTConfig, LlamaConfig, *STAGES])
def test_every_field_is_described(config, request):
    """The line under a field is its help; `tyro` shows an empty one without complaint."""
    import ast
    import inspect

    described = set()
    for cls in config.__mro__[:-1]:
        body = ast.parse(inspect.getsource(cls)).body[0].body
        for field, below in zip(body, body[1:]):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                described.add(field.target.id)
    assert {field.name for field in dataclasses.fields(config)} == described


@pytest.mark.parametrize("columns", ["1", "12", "20", "500"])
def test_help_comes_to_an_end_in_a_terminal_of_any_width(columns: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as stop:
        parse_cli(SFTConfig, ["--help"])
    assert stop.value.code == 0 and "--max-steps" in capsys.readouterr().out.replace("\n", "")
