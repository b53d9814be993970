"""Tables as markdown, and the figures in their cells."""

from experiments.markdown import interval, number, table


def test_a_table_has_a_rule_under_its_head_and_a_line_per_row():
    assert table("a | b", [(1, ""), ("x", 2.5)]) == "| a | b |\n|---|---|\n| 1 |  |\n| x | 2.5 |"
    assert table("alone", []) == "| alone |\n|---|"


def test_figures_have_a_format_and_a_unit_and_none_is_empty():
    assert (number(0.256, ".0%"), number(1.234, ".2f", " GB"), number(None, ".2f", " GB")) == ("26%", "1.23 GB", "")
    assert (interval((0.1, 0.25)), interval((-1, 2), "+.1f")) == ("(0.10 to 0.25)", "(-1.0 to +2.0)")
