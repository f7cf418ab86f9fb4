"""The benchmark page's figures are those of the JSON files."""

from recipes.benchmarks.tables import MARK, README, TABLES, filled


def test_the_page_has_the_tables_that_the_results_give():
    text = README.read_text(encoding="utf-8")
    assert filled(text) == text, "run `python recipes/benchmarks/tables.py`"
    assert {match[2] for match in MARK.finditer(text)} == set(TABLES)
