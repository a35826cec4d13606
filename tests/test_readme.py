"""The README's figures are those of the newest result file, and its code runs."""

import re
from pathlib import Path

from spnet.analysis.benchmarks import update_readme

ROOT = Path(__file__).parents[1]


def test_measured_section_is_up_to_date():
    text = (ROOT / "README.md").read_text()
    expected = update_readme(text, ROOT / "bench" / "results", "bench/results")
    assert text == expected, "run `spnet bench --readme README.md`"


def test_the_code_runs():
    use, train = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(use, names)
    names |= {name: names[name][:20] for name in ("x", "labels")}  # training takes longer
    before = names["model"].heads[-1].weight.clone()
    exec(train, names)
    assert set(names["terms"]) == {"cls", "act", "path", "logits", "evo"}
    assert not before.equal(names["model"].heads[-1].weight)
