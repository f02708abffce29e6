"""The report in a real browser: no requests, no complaints, every plot drawn, readable by all.

Needs Chromium or Chrome on the PATH, and fails without one: what is not looked at is not known.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_run import LAYERS, add_plan, make_run
from playwright.sync_api import Page

from abreast.report.page import write_report

pytestmark = pytest.mark.slow
SIZES = {"desktop": (1200, 900), "phone": (360, 740)}


@pytest.fixture(scope="module")
def report(tiny_checkpoint, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("made") / "run"
    name = "org/a-model-with-a-very-long-name<img src=x onerror=alert(1)>"
    make_run(run, tiny_checkpoint(num_layers=LAYERS), name)
    add_plan(run, "1+2 3+4 5+6", "depth-5-other")
    return write_report(run)


@pytest.fixture
def opened(browser, report) -> Iterator[Any]:
    """open(scheme, size) -> the page, all charts drawn; afterwards: nothing asked for, no fault."""
    contexts, requests, faults = [], [], []

    def open_page(scheme: str = "light", size: str = "desktop", **options: Any) -> Page:
        width, height = SIZES[size]
        context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": height}, **options
        )
        contexts.append(context)
        context.set_default_timeout(120_000)  # shared machines stall
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(report.as_uri())
        if options.get("java_script_enabled", True):
            page.wait_for_selector("html[data-charts=drawn]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert requests == [report.as_uri()] * len(contexts)
    assert faults == []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_plot_is_drawn_and_nothing_overflows(opened, scheme, size):
    page = opened(scheme, size)
    charts = page.eval_on_selector_all(
        ".chart",
        """all => all.map(c => [c.id, c.querySelectorAll('svg .mark-symbol path').length,
             c.querySelector('svg').getBoundingClientRect().width, c.clientWidth])""",
    )
    points = {name.removeprefix("chart-"): count for name, count, _, _ in charts}
    least = {"buy-kl": 6, "depth-kl": 6, "depth-loss": 6, "groups-kl": 6}
    least |= {"position-kl": 3, "tasks": 4, "speed": 2}
    assert points.keys() == least.keys()
    assert all(points[name] >= count for name, count in least.items()), points
    assert all(0 < width <= room + 1 for _, _, width, room in charts), charts
    assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
    assert page.locator(".stages svg").count() == 6


def test_colours_follow_the_scheme(opened):
    def paint(page: Page) -> list[str]:
        return page.evaluate(
            """() => {
              const style = (s) => getComputedStyle(document.querySelector(s));
              const within = (s) => style('#chart-depth-kl ' + s);
              return [style('body').backgroundColor, within('.role-axis-label text').fill,
                within('.mark-line path').stroke, within('.role-legend-label text').fill];
            }"""
        )

    light, dark = paint(opened("light")), paint(opened("dark"))
    assert all(a != b for a, b in zip(light, dark, strict=True)), (light, dark)
    assert all(colour.startswith("rgb") for colour in [*light, *dark])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(opened, scheme, size):
    from axe_playwright_python.sync_playwright import Axe

    page = opened(scheme, size, bypass_csp=True)  # axe is a script of its own
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    result = Axe().run(page).response
    assert len(result["passes"]) > 20  # it really looked
    serious = [
        fault for fault in result["violations"] if fault["impact"] in ("serious", "critical")
    ]
    assert not serious, [(fault["id"], fault["nodes"][0]["html"]) for fault in serious]


def test_keyboard(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    summary = page.locator("#chart-depth-kl ~ figcaption summary")
    summary.focus()
    page.keyboard.press("Enter")
    table = page.locator("#chart-depth-kl ~ figcaption table")
    assert table.is_visible() and table.locator("tbody tr").count() == 6


def test_tooltips_and_legend(opened):
    page = opened()
    page.locator("#chart-depth-kl .mark-symbol.role-mark path").first.hover()
    tip = page.locator("#vg-tooltip-element")
    tip.wait_for(state="visible")
    assert "chosen by" in tip.inner_text() and "planner" in tip.inner_text()
    line = page.locator("#chart-depth-kl .layer_1_marks path")
    assert {line.nth(i).get_attribute("opacity") for i in range(3)} <= {None, "1"}
    page.locator("#chart-depth-kl .role-legend-label text").nth(1).click()
    page.wait_for_function(
        """() => [...document.querySelectorAll('#chart-depth-kl .layer_1_marks path')]
             .filter(path => path.getAttribute('opacity') === '0.15').length === 2"""
    )


def test_names_stay_text(opened):
    page = opened()
    assert page.locator("h1").inner_text().startswith("org/a-model-with-a-very-long-name<img src=x")
    assert page.locator("img").count() == 0
    assert "</pre><script>alert(2)</script>" in page.locator(".sample pre").first.inner_text()


def test_print_shows_everything_in_light_colours(opened, tmp_path):
    page = opened("dark")
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("nav").is_hidden()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
    assert page.pdf(path=tmp_path / "report.pdf").startswith(b"%PDF")


def test_without_scripts_the_data_is_there(opened):
    page = opened(java_script_enabled=False)
    page.locator("#chart-depth-kl ~ figcaption summary").click()
    assert page.locator("#chart-depth-kl ~ figcaption table").is_visible()
    assert page.locator("noscript").inner_text().startswith("The charts need JavaScript")
