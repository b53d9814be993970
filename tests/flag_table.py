"""The tables of docs/flags.md, made from the dataclasses: `python tests/flag_table.py` writes them there.

A flag's text is the docstring of its field, so help, documentation and code cannot say different things; a test fails
when the document is behind.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1] / "src")

from config import configs
from config.configs import PPOConfig, RMConfig, RunConfig, SFTConfig, stage_defaults

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "flags.md"
BEGIN, END = "<!-- flags:begin -->", "<!-- flags:end -->"
STAGES = {"SFT": SFTConfig, "RM": RMConfig, "PPO": PPOConfig}
# GPT-2's four sizes share one recipe; so do their plain and /dropout variants.
PRESETS = {"gpt2\\*": "gpt2", "gpt2\\*/lora": "gpt2/lora", "gpt2-nano": "gpt2-nano", "gpt2-nano/lora": "gpt2-nano/lora"}


def field_texts() -> dict[tuple[str, str], str]:
    """The docstring under each field of each class of configs.py."""
    texts = {}
    for node in ast.parse(Path(configs.__file__).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            for field, text in zip(node.body, node.body[1:]):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    texts[node.name, field.target.id] = " ".join(text.value.value.split())
    return texts


def shown_flag(stage: type, name: str) -> str:
    """A flag as it is typed: short form, long form, choices."""
    hint = get_type_hints(stage, include_extras=True)[name]
    aliases = [alias for note in getattr(hint, "__metadata__", ()) for alias in getattr(note, "aliases", None) or ()]
    plain = get_type_hints(stage)[name]
    options = get_args(plain) if get_origin(plain) is Literal else ()
    choices = " " + "\\|".join(options) if len(options) > 1 else ""
    return ", ".join(f"`{flag}`" for flag in [*aliases, "--" + name.replace("_", "-")]) + choices


def shown_value(value: Any) -> str:
    """A default as it would be typed; a dash for an empty one."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`" if value != "" else "-"


def tables() -> str:
    """All tables: what the stages share, what each adds, and the defaults that depend on the preset."""
    texts, shared = field_texts(), [field.name for field in fields(RunConfig)]
    lines = ["**All three stages.**", "", "| flag | default | meaning |", "|---|---|---|"]
    for name in shared:
        defaults = {shown_value(value) for stage in STAGES for value in _defaults(stage, name)}
        default = defaults.pop() if len(defaults) == 1 else "by preset" if name != "config" else "`gpt2-nano`"
        lines.append(f"| {shown_flag(RunConfig, name)} | {default} | {_cell(texts['RunConfig', name])} |")
    for stage, cls in STAGES.items():
        own = [field.name for field in fields(cls) if field.name not in shared]
        lines += ["", f"**{stage} only.**", "", "| flag | default | meaning |", "|---|---|---|"]
        for name in own:
            defaults = {shown_value(value) for value in _defaults(stage, name)}
            default = defaults.pop() if len(defaults) == 1 else "by preset"
            lines.append(f"| {shown_flag(cls, name)} | {default} | {_cell(texts[cls.__name__, name])} |")
    lines += [
        "",
        "**Defaults by preset** (`gpt2*` stands for its four sizes, plain or `/dropout`; their "
        "`--tokens-per-micro-batch` is 8192, 4096, 2048 and 1024 from small to XL).",
        "",
    ]
    lines += [f"| stage | flag | {' | '.join(PRESETS)} |", "|---|---|" + "---|" * len(PRESETS)]
    for stage, cls in STAGES.items():
        for field in fields(cls):
            values = _defaults(stage, field.name)
            everywhere = {shown_value(v) for s in STAGES for v in _defaults(s, field.name)}
            varies = len(set(values)) > 1 or (field.name in shared and len(everywhere) > 1)
            if varies and field.name != "config":
                flag = "--" + field.name.replace("_", "-")
                lines.append(f"| {stage} | `{flag}` | {' | '.join(map(shown_value, values))} |")
    return "\n".join(lines)


def _defaults(stage: str, name: str) -> list[Any]:
    """The default of a flag under each preset; nothing if the stage does not have it."""
    configured = [stage_defaults(STAGES[stage], preset) for preset in PRESETS.values()]
    return [getattr(config, name) for config in configured if hasattr(config, name)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def with_tables(document: str) -> str:
    """The document with fresh tables between its two marker lines."""
    head, rest = document.split(BEGIN + "\n")
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{tables()}\n{END}{tail}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
