"""The model card of an export: what the run's records say, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config.scrub import scrub
from config.user_error import UserError
from experiments.doctor.record import read_series
from experiments.export.contents import Export
from experiments.export.place import CONFIG
from experiments.export.records import base_model, origin, record_of
from experiments.markdown import table
from models.weights.huggingface import FORMS
from utils.chat_templates import PLAIN
from utils.runs.origins import without_folders

_USE = {
    False: """\
from transformers import pipeline

chat = pipeline("text-generation", "{name}")
print(chat([{{"role": "user", "content": "Hello."}}], do_sample=False)[0]["generated_text"][-1]["content"])
""",
    True: """\
from transformers import pipeline

score = pipeline("text-classification", "{name}")
dialogue = [{{"role": "user", "content": "Hello."}}, {{"role": "assistant", "content": "Hello. How can I help?"}}]
print(score(score.tokenizer.apply_chat_template(dialogue, tokenize=False)))
""",
}


def card(
    export: Export, folder: Path, name: str, checkpoint: Path, description: dict[str, Any], told: Sequence[str],
    runs_dir: str,
) -> str:  # fmt: skip
    """README.md.

    Args:
        export: what `folder` holds. name: of the folder in its place.
        checkpoint: what it was made of. description: its model.json.
        told: a line on each reading back. runs_dir: where the runs behind this one may be.
    """
    run = record_of(checkpoint)[0]
    facts = _facts(export, checkpoint, description, runs_dir)
    parts = [
        "---",
        f"library_name: transformers\npipeline_tag: text-{'classification' if export.is_reward else 'generation'}",
        "---",
        f"# {_cell(run.name)}\n",
        table("from its records | ", [(key, _cell(value)) for key, value in facts.items() if value not in (None, "")]),
    ]
    figures = _figures(run, description.get("step"))
    if figures:
        parts.append("\nLast figures on held-out data, as the run wrote them:\n")
        parts.append(table("figure | step | value", figures))
    parts.append("\n## Use\n\n```python\n" + _USE[export.is_reward].format(name=name) + "```\n")
    template = export.source.template
    marks = template.marks
    written = template.format(["..."]) if marks is None else marks.prompt([("user", "...")])
    told_of_system = "as plain text before it (none was trained on)" if marks is None else "in the same form"
    parts.append(
        f"The context is {export.source.context} tokens. A prompt is written {written!r}; the chat template does so, "
        f"with a system message {told_of_system}. For a longer prompt "
        f"`truncation=True` cuts its start off{export.told_of_room()}. A text with the EOS token written "
        "in it is read as its end, as everywhere in transformers; `split_special_tokens=True` prevents that.\n"
    )
    constant = json.loads((folder / CONFIG).read_text()).get("reward_constant")
    if constant is not None:
        parts.append(
            f"The run's own scores are these and {constant:.6g} more, a constant that the model's class has no place "
            "for: `score.model.config.reward_constant`. What is better than what, and by how much, is the same.\n"
        )
    parts += ["Held against the run:\n", *(f"- {line}" for line in told)]
    parts.append(
        "\n## Licence\n\nNone is given here. What applies depends on the model it was trained from and on its data."
    )
    return "\n".join(parts) + "\n"


def _facts(export: Export, checkpoint: Path, description: dict[str, Any], runs_dir: str) -> dict[str, Any]:
    _, record, config = record_of(checkpoint)
    stage, model = str(description.get("stage")), export.source.model
    form = next(form for form in FORMS.values() if form.family == model.family)
    rank, eos = model.config.lora_rank, ", ".join(map(str, export.stop_ids))
    trained_from, base = origin(description), base_model(checkpoint, description, runs_dir)
    return {
        "run": without_folders(checkpoint),
        "stage": {"sft": "supervised fine-tuning (SFT)", "rm": "reward model", "ppo": "PPO"}.get(stage, stage),
        "steps": description.get("step"),
        "family": f"{form.what.removeprefix('a ')} ({form.classes[model.role]})",
        "trained from": trained_from,
        "base model": base if base != trained_from else "",
        "adapters": f"LoRA of rank {rank}, merged into the weights" if rank else "",
        "reward model": without_folders(str(record.get("rm") or "")),
        "reward function": Path(str(config.get("reward_fn") or "")).name,
        "data set": Path(str(config.get("dataset") or "")).name,
        "preset": config.get("config"),
        "seed": config.get("seed"),
        "commit": record.get("commit"),
        "weights": export.dtype,
        "prompt template": marks.name if (marks := export.source.template.marks) else PLAIN,
        "ids of EOS" if len(export.stop_ids) > 1 else "id of EOS": eos,
    }


def _figures(run: Path, step: Any) -> list[tuple[str, int, str]]:
    """The last value of every figure on held-out data up to the checkpoint's step; [] where there is no record."""
    try:
        series = read_series(run / "metrics.jsonl")
    except UserError:
        return []
    rows = []
    for tag, points in series.items():
        points = points.finite().kept(points.finite().steps <= (step if isinstance(step, int) else -1))
        if tag.startswith("eval/") and len(points):
            rows.append((_cell(tag), *points.point(-1)))
    return [(tag, at, f"{value:.4g}") for tag, at, value in rows]


def _cell(value: object) -> str:
    """A value of a record in a line of markdown."""
    return scrub(" ".join(str(value).split())).replace("|", "\\|").replace("<", "&lt;")
