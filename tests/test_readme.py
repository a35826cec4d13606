"""The README's figures are those of the newest result file."""

from pathlib import Path

from spnet.analysis.benchmarks import update_readme

ROOT = Path(__file__).parents[1]


def test_measured_section_is_up_to_date():
    text = (ROOT / "README.md").read_text()
    expected = update_readme(text, ROOT / "bench" / "results", "bench/results")
    assert text == expected, "run `spnet bench --readme README.md`"
