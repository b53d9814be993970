"""Markdown tables, and the figures in their cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: str, rows: Iterable[Iterable[object]]) -> str:
    """A table whose head is given as in markdown, "a | b", without the outer bars."""
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, cells)) + " |" for cells in rows)])


def number(value: float | None, form: str, unit: str = "") -> str:
    """A figure in a format such as ".2f" with its unit; nothing where there is none."""
    return "" if value is None else f"{value:{form}}{unit}"


def interval(ends: Sequence[float], form: str = ".2f") -> str:
    """An interval in brackets."""
    return f"({ends[0]:{form}} to {ends[1]:{form}})"
