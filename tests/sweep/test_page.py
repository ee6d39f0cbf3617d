"""sweep.html in a browser, light and dark: complete, readable, interactive and self-contained."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raycluster.sweep.config import SweepConfig
from raycluster.sweep.open import open_sweep
from raycluster.sweep.outputs import write_outputs
from raycluster.sweep.plan import Sweep
from raycluster.sweep.trials import Trial

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1100,2600",
]
SEARCH = (
    "{method.num_clusters: {log_int: [10, 1000], steps: 4}, method.sampling: [uniform, weighted],"
    " training.lr: {log_float: [0.01, 0.3], steps: 3}}"
)
LISTEN = "<script>const failures = []; addEventListener('error', event => failures.push(event.message));</script>"
EXAMINE = """<script>
const texts = [...document.querySelectorAll('svg text')].map(text => [text, text.getBoundingClientRect()]);
const within = ([text, box]) => {
  const all = text.ownerSVGElement.getBoundingClientRect();
  const across = box.left >= all.left - 1 && box.right <= all.right + 1;
  return across && box.top >= all.top - 1 && box.bottom <= all.bottom + 1;
};
const meet = (a, b) => a.left < b.right && b.left < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom;
const named = ([text, box]) => text.textContent;
const found = {
  dark: matchMedia('(prefers-color-scheme: dark)').matches,
  too_wide: document.documentElement.scrollWidth - innerWidth,
  outside: texts.filter(text => !within(text)).map(named),
  overlapping: texts.flatMap(([text, box], index) => texts.slice(index + 1)
    .filter(other => other[0].ownerSVGElement === text.ownerSVGElement && meet(box, other[1]))
    .map(other => text.textContent + ' / ' + named(other))),
  titles: [...document.querySelectorAll('h2')].map(title => title.textContent),
  charts: document.querySelectorAll('svg').length,
  colours: [getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor],
  requests: performance.getEntriesByType('resource').length,
};
const first = document.querySelector('circle[data-trial]');
first.dispatchEvent(new PointerEvent('pointerenter'));
found.lit = [...document.querySelectorAll('.lit')].map(mark => mark.tagName + mark.dataset.trial);
first.dispatchEvent(new PointerEvent('pointerleave'));
const heads = [...document.querySelectorAll('th')];
const column = heads.findIndex(head => head.textContent === 'worker-seconds');
heads[column].click();
found.sorted = [...document.querySelectorAll('tbody tr')].map(row => Number(row.cells[column].dataset.value));
found.failures = failures;
const told = document.createElement('pre');
told.id = 'found';
told.textContent = JSON.stringify(found);
document.body.append(told);
</script></body>"""


@pytest.fixture(scope="session")
def browser() -> Callable[..., str]:
    """browser(page, word...): what headless Chromium prints. It may be missing unless RAYCLUSTER_BROWSER=required."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None and os.environ.get("RAYCLUSTER_BROWSER") == "required":
        pytest.fail(f"no browser ({', '.join(NAMES)}), but RAYCLUSTER_BROWSER=required: apt-get install chromium")
    if path is None:
        pytest.skip("no browser; apt-get install chromium")

    def run(page: Path, *words: str) -> str:
        profile = page.parent / "profile"
        command = [path, *OPTIONS, f"--user-data-dir={profile}", *words, page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        shutil.rmtree(profile, ignore_errors=True)
        return done.stdout

    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, tiny_sweep: Callable[..., SweepConfig]) -> Path:
    """The page of a sweep with finished, stopped, failed and running trials."""
    folder = tmp_path_factory.mktemp("a <sweep> & its page")
    config = tiny_sweep(folder, SEARCH, "training.epochs=9", "sweep.early_stopping=asha")
    sweep = open_sweep(config)
    while trial := sweep.next():
        if trial.number == 17:
            sweep.close(trial.name, "failed", "training diverged")
        elif trial.number < 23:
            run(sweep, trial)
        else:
            sweep.tell(trial.name, record(trial, 0))
    write_outputs(sweep)
    return folder / "sweep.html"


def run(sweep: Sweep, trial: Trial) -> None:
    for number in range(9):
        if sweep.tell(trial.name, record(trial, number)):
            break
    sweep.close(trial.name)


def record(trial: Trial, number: int) -> dict[str, Any]:
    method, lr = trial.config.method, trial.config.training.lr
    good = 0.9 - 0.05 * abs(np.log10(method.num_clusters / 100)) - 0.1 * abs(np.log10(lr / 0.05))
    good += 0.02 * (method.sampling == "uniform") + 0.003 * (trial.number * 7 % 5)
    return {
        "round": number,
        "epoch": number + 1.0,
        "knn_accuracy": float(good * (1 - 0.5 ** (number + 1))),
        "linear_probe_accuracy": float(good),
        "intra_cluster_edges": 1 / method.num_clusters,
        "effective_rank": 40 * float(good),
        "loss_over_chance": lr + 0.01 * trial.number,
        "seconds_training": 3.0 + trial.number % 4,
        "assignments": f"{trial.number}",
    }


def test_the_page_is_self_contained(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"https?:|src=|@import|url\(", text)
    assert len(text) < 300_000
    assert "<sweep>" not in text and "a &lt;sweep&gt; &amp; its page" in text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_rendering(browser: Callable[..., str], page: Path, tmp_path: Path, scheme: str) -> None:
    examined = tmp_path / "examined.html"
    text = page.read_text().replace("<head>", f"<head>{LISTEN}")
    examined.write_text(text.replace("</body>", EXAMINE))
    option = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    dom = browser(examined, option, "--dump-dom")
    match = re.search(r'<pre id="found">(.*?)</pre>', dom)
    assert match, dom[-2000:]
    found = json.loads(unescape(match[1]))
    assert found["failures"] == [] and found["requests"] == 0
    assert found["dark"] == (scheme == "dark")
    assert found["too_wide"] <= 0 and found["outside"] == [] and found["overlapping"] == []
    assert found["titles"] == [
        "Trials",
        "knn_accuracy by searched setting",
        "All settings together",
        "Learning curves",
        "Label-free scores",
        "Cost",
    ]
    assert found["charts"] == 3 + 1 + 1 + 3 + 1
    lit = set(found["lit"])
    assert len({mark[-3:] for mark in lit}) == 1 and {mark[:-3] for mark in lit} == {"TR", "circle", "polyline", "rect"}
    assert found["sorted"] == sorted(found["sorted"], reverse=True) and len(found["sorted"]) == 24

    ink, paper = (np.array([int(part) for part in re.findall(r"\d+", colour)]) for colour in found["colours"])
    assert abs(ink.mean() - paper.mean()) > 180
    screenshot = tmp_path / f"{scheme}.png"
    browser(page, option, f"--screenshot={screenshot}")
    pixels = np.asarray(Image.open(screenshot).convert("RGB")).astype(int)
    assert (np.abs(pixels[5, 5] - paper) <= 2).all() and (paper.mean() < 60) == (scheme == "dark")
    best = (255, 146, 72) if scheme == "dark" else (217, 72, 15)
    assert (np.abs(pixels - best).max(axis=2) <= 3).sum() > 500, "the best trial is highlighted"
    assert (np.abs(pixels - paper).max(axis=2) > 40).mean() > 0.03, "the page is not blank"
