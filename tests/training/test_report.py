"""The page about a run: what it says is what the log says, and a browser shows all of it without a network."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_trainer import log_of, make_set, make_trainer

from spnet.cli import main
from spnet.training import TrainConfig
from spnet.training.data import Loader
from spnet.training.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PICTURES = ["terms", "accuracy", "execution rate of every", "path churn", "execution rate by", "histogram", "images"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("report") / "<b>run"  # a name that is no HTML
    make_trainer(run).fit()
    return run


def held_out():
    return Loader(make_set(24, seed=1), 10, train=False)


def facts(page):
    return {k: unescape(v) for k, v in re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", page.read_text())}


def pictures(page):
    return re.findall(r'<img alt="(.*?)" src="data:image/png;base64,[\w+/]+=*">', page.read_text())


def test_page(run):
    page = write_report(run, loader=held_out())
    assert page == run / "report.html"
    got, last = facts(page), log_of(run)[-1]
    assert got["trained"] == "2 of 2 epochs, 8 steps of 8 images"
    assert got["last test accuracy"] == f"{last['test']['accuracy']:.2%}"
    assert got["path churn"].startswith(f"{last['test']['churn']:.2%} of the decisions")
    assert got["out"] == str(run)
    assert got["lr"] == "0.05"
    assert [p.startswith(name) for p, name in zip(pictures(page), PICTURES, strict=True)] == [True] * len(PICTURES)
    assert "<h2>Paths of 24 samples</h2>" in page.read_text()
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', page.read_text()) == []


def test_page_is_utf8_in_any_locale(run, tmp_path, monkeypatch):
    elsewhere = shutil.copytree(run, tmp_path / "copy", symlinks=True)
    config = TrainConfig.load(run / "config.json")
    # The end is how a name that is no UTF-8 arrives.
    dataclasses.replace(config, data_root="größe \udce9").save(elsewhere / "config.json")
    monkeypatch.setattr(Path, "write_text", lambda *args: pytest.fail("in the locale's encoding"))
    page = write_report(elsewhere, tmp_path / "page.html", loader=held_out(), limit=2)
    assert "größe ?</td>" in page.read_bytes().decode("utf-8")


def test_limit(run, tmp_path):
    page = write_report(run, tmp_path / "new" / "page.html", loader=held_out(), limit=13)
    assert "<h2>Paths of 13 samples</h2>" in page.read_text()


def test_easiest_and_hardest_images_are_those_of_the_test_set(run, monkeypatch):
    from spnet.training import report

    shown, images = [], make_set(24, seed=1).images.permute(0, 2, 3, 1)
    easiest_hardest = report.easiest_hardest
    monkeypatch.setattr(report, "PICTURED", 3)
    monkeypatch.setattr(report, "easiest_hardest", lambda *args: shown.append(args) or easiest_hardest(*args))
    stats = []
    monkeypatch.setattr(report, "rate_heat_map", lambda s, draw=report.rate_heat_map: stats.append(s) or draw(s))
    write_report(run, loader=held_out())
    ((chosen, pixels, n),) = shown
    order = stats[0].by_difficulty
    expected = torch.cat([order[:3], order[-3:]])
    assert n == 3
    assert torch.equal(pixels[chosen.by_difficulty], images[expected])
    assert torch.equal(chosen.macs[chosen.by_difficulty], stats[0].macs[expected])


def test_static_run(tmp_path):
    make_trainer(tmp_path, static=True, epochs=1).fit()
    page = write_report(tmp_path, loader=held_out())
    assert [p.startswith(name) for p, name in zip(pictures(page), PICTURES[:2], strict=True)] == [True] * 2
    assert "every image executes every block" in page.read_text()
    assert "path churn" not in facts(page)


def test_no_alignment_where_nothing_moves(run, tmp_path, monkeypatch):
    monkeypatch.setattr("spnet.training.report.evolution_alignment", lambda *args: math.nan)
    page = write_report(run, tmp_path / "page.html", loader=held_out(), limit=2)
    assert "alignment" not in facts(page)
    assert "nan" not in facts(page).values()


def test_what_is_no_run(run, tmp_path):
    result = CliRunner().invoke(main, ["report", str(tmp_path / "nothing")])
    assert result.exit_code == 1
    assert f"run: no training run at {tmp_path / 'nothing'}" in result.output
    broken = tmp_path / "broken"
    shutil.copytree(run, broken, symlinks=True)
    (broken / "log.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"log.jsonl: not the log of a training run \(KeyError"):
        write_report(broken, loader=held_out())
    (broken / "log.jsonl").write_text(json.dumps({"kind": "step", "step": 1}) + "\n")
    with pytest.raises(ValueError, match="log: expected at least one whole epoch, got none"):
        write_report(broken, loader=held_out())


PROBE = """<script>addEventListener("load", () => {
  document.title = JSON.stringify({
    pictures: [...document.images].map(i => i.naturalWidth),
    loaded: performance.getEntriesByType("resource").map(r => r.name.slice(0, 5)),
    beyond: document.documentElement.scrollWidth - innerWidth,
  })
})</script>"""


@pytest.mark.parametrize("width", [500, 1200])
def test_in_a_browser(run, tmp_path, width):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser; install one of {', '.join(BROWSERS)}")
    page = write_report(run, tmp_path / "page.html", loader=held_out())
    page.write_text(page.read_text() + PROBE)
    options = f"--headless --no-sandbox --disable-gpu --virtual-time-budget=10000 --window-size={width},900 --dump-dom"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [browser, *options.split(), profile, page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    seen = json.loads(unescape(re.search("<title>(.*?)</title>", dom)[1]))
    assert len(seen["pictures"]) == len(PICTURES)
    assert all(w >= 1000 for w in seen["pictures"])
    assert set(seen["loaded"]) <= {"data:"}
    assert seen["beyond"] <= 0
