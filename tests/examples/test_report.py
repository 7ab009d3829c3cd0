"""The page of results: well-formed, of one file, and as a browser shows it."""

import dataclasses
import html.parser
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image  # Matplotlib's

from examples.llm.program.events import RunResult
from examples.llm.program.palettes import LIGHT
from examples.llm.program.report import by_method, write_report
from examples.llm.program.settings import Settings
from examples.llm.program.spreads import spread_of

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
VOID = {"meta", "link", "path", "use", "br"}


def run(method, seed, after):
    return RunResult(
        method=method, seed=seed, loss_before=3.0, loss_after=after,
        scores_before={"accuracy": 0.5}, scores_after={"accuracy": 0.75},
        losses=[3.0, 2.0 - seed], step_seconds=[0.5, 0.25], state_bytes=2**20,
        peak_bytes=3 * 2**20, kept_step=2,
        evaluations=[
            {"step": step, "loss": after, "scores": {"accuracy": 0.5}} for step in (1, 2)
        ],
        continuation="<script>alert(1)</script>",
    )  # fmt: skip


@pytest.fixture(scope="module")
def results():
    return [run(method, seed, 1.0 + seed) for method in ("adamw", "mezo") for seed in (0, 1)]


@pytest.fixture(scope="module")
def path(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    settings = Settings(method=("adamw", "mezo"), seeds=(0, 1), prompt="We", task="a<b>.txt")
    write_report(settings, results, folder)
    return folder / "report.html"


class Reader(html.parser.HTMLParser):
    """Checks that elements are closed in order, and gathers what the tests look at."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href", "src", "srcset", "action", "data"):
                self.links.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def reader(path):
    reader = Reader()
    reader.feed(path.read_text())
    reader.close()
    assert not reader.open
    return reader


def test_ids_are_unique_and_links_stay_inside(path, reader):
    assert len(set(reader.ids)) == len(reader.ids) > 10
    assert {link.removeprefix("#") for link in reader.links} - {"data:,"} <= set(reader.ids)
    text = path.read_text()
    clipped = set(re.findall(r"url\(#([^)]*)\)", text))
    assert clipped and clipped <= set(reader.ids)
    assert "http" not in text and "@import" not in text
    assert "<script" not in text  # that of the continuation is text
    assert not re.search(r"#0000[0-9a-f]{2}", text)  # every colour is the page's


def test_the_page_has_means_and_deviations(reader):
    text = " ".join(reader.text)
    assert text.count("1.5000 ± 0.7071") == 2  # of both methods
    assert "<script>alert(1)</script>" in text
    assert "full tuning on a<b>.txt" in text


def test_deviations_are_those_of_samples(results):
    assert list(by_method(results)) == ["adamw", "mezo"]
    values = [1.0, 2.0, 4.0]
    spread = spread_of(values)
    np.testing.assert_allclose(spread, (np.mean(values), np.std(values, ddof=1)))
    assert spread_of([1.5]).words(".1f") == spread_of([1.5, 1.5]).words(".1f") == "1.5"


def test_a_run_that_diverged_is_drawn(results, tmp_path):
    nan = float("nan")
    diverged = dataclasses.replace(results[0], losses=[3.0, nan], loss_after=nan)
    write_report(Settings(), [diverged], tmp_path)
    assert (tmp_path / "report.png").exists()


def test_the_picture_has_the_colours_of_every_method(path):
    """Nothing keeps the marks that the page's own colours replace."""
    pixels = np.asarray(Image.open(path.with_name("report.png")).convert("RGB"))
    colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    found = {"#{:02x}{:02x}{:02x}".format(*colour) for colour in colours[counts > 100]}
    assert {LIGHT.paper, LIGHT.text, *LIGHT.series[:2]} <= found
    assert not any(colour.startswith("#0000") for colour in found)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize(("scheme", "brightness"), [(1, (200, 256)), (0, (0, 60))])
def test_a_browser_shows_it_in_light_and_in_dark(path, scheme, brightness):
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "page.png"
        subprocess.run(
            [
                BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                f"--user-data-dir={folder}", "--window-size=500,3000",
                f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}",
                path.as_uri(),
            ],
            check=True, capture_output=True, timeout=100,
        )  # fmt: skip
        pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    low, high = brightness
    assert low <= np.median(pixels) < high
    # Bars and curves have colours; nothing is wider than the window.
    colourful = (pixels.max(-1) - pixels.min(-1)) > 100
    assert colourful.sum() > 2000
    assert not colourful[:, -8:].any()
