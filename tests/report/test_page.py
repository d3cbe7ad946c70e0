"""Every page in a real browser: nothing cut or hidden, nothing unreadable, nothing loaded; by axe-core where it is."""

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from pcdistill.data.findings import Findings, SplitFacts, make_sample
from pcdistill.report import write_compare_report, write_run_report, write_students_report
from pcdistill.report.data_page import write_data_page
from tests.report.runs import (
    EVIL,
    curves_of,
    make_answers,
    make_comparison,
    make_result,
    make_run,
    make_samples,
    stopped,
)

WIDTHS = (390, 768, 1400)
SCHEMES = ("light", "dark")
# What hides something sideways must show that it does: a class whose edge is shaded, reached by the keyboard too.
HIDDEN = """() => [...document.querySelectorAll('main *')].filter(e => {
  const style = getComputedStyle(e);
  if (e.closest('svg') || e.scrollWidth <= e.clientWidth + 1 || style.display === 'inline') return false;
  return !(e.matches('.scroll[tabindex="0"][aria-label]') && style.backgroundImage.includes('gradient'));
}).map(e => e.outerHTML.slice(0, 200))"""
OUTSIDE = """() => [...document.querySelectorAll('main *')].filter(e => {
  const box = e.getBoundingClientRect();
  return !e.closest('.scroll, svg') && box.width > 0 && (box.right > innerWidth + 1 || box.left < -1);
}).map(e => e.outerHTML.slice(0, 200))"""
UNDER_THE_FIRST = """() => [...document.querySelectorAll('.scroll')].filter(e => {
  e.scrollLeft = 1e6;
  const first = e.querySelector('tbody tr > :first-child');
  return first && Math.abs(first.getBoundingClientRect().left - e.getBoundingClientRect().left) > 1.5;
}).length"""


def chromium():
    """The browser's program: $CHROMIUM, or what the system has."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if name and (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = chromium()
    if program is None:
        pytest.skip("there is no Chromium (apt-get install chromium, or set CHROMIUM)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def classifier(folder):
    run = make_run(make_answers(folder / "run", 400, classes=[f"class number {i} of many" for i in range(12)]))
    make_run(run / "alone", result=make_result("none", best=89.0))
    make_answers(run / "alone", 400, classes=[f"class number {i} of many" for i in range(12)], teacher=False, seed=1)
    return write_run_report(run)


def many_classes(folder):
    run = make_answers(folder / "many", 900, classes=[f"{EVIL} {'x' * 60} {i}" for i in range(200)], side=8)
    return write_run_report(make_run(run))


def detector(folder):
    run = make_samples(folder / "detector")
    at = {"map": 41.25, "map_50": 60.0, "map_75": 44.0, "map_small": 1.0, "map_medium": 2.0, "map_large": 3.0}
    result = make_result(task="detection", metric="map")
    for who in ("teacher", "best", "last"):
        result[who].update(val={**at, "per_class": {"cat": 50.0, "dog": None}}, test=at)
    return write_run_report(make_run(run, result=result))


def unfinished(folder):
    return write_run_report(make_run(folder / "unfinished", result=stopped(), rows=[]))


def few_methods(folder):
    results = make_comparison()
    return write_compare_report(folder / "few", results, curves_of(results), "pcdistill compare " + "x" * 300)[0]


def many_methods(folder):
    names = ["none", "kd", "pcd", *(f"a_rather_long_name_of_a_method_{i}_of:Class" for i in range(7))]
    results = [make_result(n, s, 90.0 + i + 0.1 * s, strength=t) for i, n in enumerate(names) for s in (0, 1)
               for t in (1.0, 4.0)]  # fmt: skip
    drawn = {name: make_samples(folder / "many-runs" / f"m{i}", masks=False) for i, name in enumerate(names)}
    return write_compare_report(folder / "many-methods", results, curves_of(results), "", drawn=drawn)[0]


def students(folder):
    results = {}
    for i, name in enumerate(("cifar/resnet8", "timm/a_model_with_a_long_name.of_its_tag", "timm/b")):
        size = {"name": name, "parameters": 10**5 * (i + 1), "macs": 10**7 * (i + 1)}
        results[name] = [{**r, "student": size} for r in make_comparison()]
    return write_students_report(folder / "students", results, "pcdistill compare --students a,b,c")


def data(folder):
    boxes = [("cat", 4.0, 4.0, 30.0, 30.0), ("a dog" * 8, 5.0, 5.0, 20.0, 9.0)]
    samples = [make_sample(Image.new("RGB", (64, 48)), "train", "a.jpg", boxes=boxes)]
    split = SplitFacts("train", "/data/" + "folder with a long name/" * 8, 120, {"cat": 10, "a dog" * 8: 4}, 3)
    found = Findings("yolo:data.yaml", "detection", "YOLO", ["cat", "a dog" * 8], [split], samples=samples)
    return write_data_page(found, folder / "data.html")


PAGES = {
    f.__name__: f for f in (classifier, many_classes, detector, unfinished, few_methods, many_methods, students, data)
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    made: dict[str, Path] = {}

    def page(name):
        if name not in made:
            made[name] = PAGES[name](tmp_path_factory.mktemp(name))
        return made[name]

    return page


def violations(page):
    """What axe-core finds; [] where it is not installed."""
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ImportError:
        return []
    found = Axe().run(page).response["violations"]
    return [(one["id"], node["html"][:200], node.get("failureSummary")) for one in found for node in one["nodes"][:2]]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_can_be_read_and_loads_nothing(browser, written, name, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(written(name).as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert [url for url in asked if not url.startswith("data:")] == [written(name).as_uri()]
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate(HIDDEN) == []
    assert page.evaluate(UNDER_THE_FIRST) == 0
    assert violations(page) == []
    context.close()


@pytest.mark.slow
def test_at_1400_pixels_no_result_is_hidden(browser, written):
    for name in ("classifier", "detector", "few_methods", "many_methods", "students"):
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(written(name).as_uri())
        hidden = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1)"
        labels = page.evaluate(f"{hidden}.map(e => e.ariaLabel)")
        assert [one for one in labels if not one.startswith("figures of: ")] == [], name
        page.close()


@pytest.mark.slow
def test_dark_and_light_are_two_pictures_and_plots_follow(browser, written):
    seen = {}
    for scheme in SCHEMES:
        page = browser.new_page(color_scheme=scheme)
        page.goto(written("few_methods").as_uri())
        seen[scheme] = page.evaluate(
            "() => [getComputedStyle(document.body).backgroundColor, ...new Set([...document.querySelectorAll("
            "'.chart text')].map(e => getComputedStyle(e).fill)), ...new Set([...document.querySelectorAll("
            "'.chart path')].map(e => getComputedStyle(e).stroke))].sort()"
        )
        page.close()
    assert set(seen["light"]) & set(seen["dark"]) <= {"none"}
