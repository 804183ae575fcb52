"""The run page in a browser: it draws, complains of nothing, needs no network, and fits a telephone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from example_run import make_run
from page_browser import MISSING, Browser

from trainer.report import write_report

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

EVIL = "</script><script>document.title='broken in'</script><img src=x onerror=\"document.title='broken in'\">"
# What is wider than the window without being inside of a box that scrolls.
TOO_WIDE = """
const inBox = (e) => e.closest('.scroll, pre, nav');
return [...document.querySelectorAll('body *')]
  .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !inBox(e)).map((e) => e.outerHTML.slice(0, 200));
"""
# Text of a chart that reaches out of it.
CUT_OFF = """
return [...document.querySelectorAll('.stage svg')].flatMap((svg) => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter((text) => {
    const at = text.getBoundingClientRect();
    return at.left < box.left - 1 || at.right > box.right + 1 || at.bottom > box.bottom + 1 || at.top < box.top - 1;
  }).map((text) => `${svg.getAttribute('aria-label')}: ${text.textContent}`);
});
"""
EMPTY = """
return [...document.querySelectorAll('figure[data-chart]')]
  .filter((figure) => !figure.querySelector('.line, .dot, .area, .heat rect, .right')).map((f) => f.dataset.chart);
"""
# The least contrast of text in the page with the page's background.
CONTRAST = """
const light = (colour) => {
  const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => {
    const share = part / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
};
const ground = light(getComputedStyle(document.body).backgroundColor);
const ratio = (colour) => (Math.max(light(colour), ground) + 0.05) / (Math.min(light(colour), ground) + 0.05);
const styles = (selector) => [...document.querySelectorAll(selector)].map((e) => getComputedStyle(e));
const texts = styles('p, dt, dd, th, td, a, h1, h2, h3, li').map((style) => style.color);
const strokes = styles('.line').map((style) => style.stroke);
return [Math.min(...texts.map(ratio)), Math.min(...strokes.map(ratio))];
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as running:
        yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of a run with everything, of one with next to nothing, and of several."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [make_run(folder / "full", steps=600), make_run(folder / "other", "other", steps=300, ranks=40, seed=1)]
    few = folder / "few"
    few.mkdir()
    (few / "metrics.jsonl").write_text('{"step": 5, "train/loss": 2.0, "time/forward": 0.4, "time/host": 0.6}\n')
    return {
        "full": write_report(runs[:1]),
        "many ranks": write_report(runs[1:]),
        "few": write_report([few]),
        "comparison": write_report([*runs, few], folder / "comparison.html"),
    }


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [
        *(("full", width, scheme) for width in (1280, 390) for scheme in ("light", "dark")),
        *((name, *view) for name in ("many ranks", "few", "comparison") for view in ((1280, "light"), (390, "dark"))),
    ],
)
def test_pages_draw_fit_and_are_quiet(
    browser: Browser, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    browser.open(pages[name], width, scheme)
    assert browser.messages() == []
    assert browser.requests() == [pages[name].resolve().as_uri()]
    assert browser.run("return document.documentElement.scrollWidth") == width
    assert browser.run(TOO_WIDE) == []
    assert browser.run(CUT_OFF) == []
    assert browser.run(EMPTY) == []
    assert browser.run("return document.querySelectorAll('figure[data-chart] svg').length") > 1
    of_text, of_lines = browser.run(CONTRAST)
    assert of_text >= 4.5
    assert of_lines >= 3


def test_pictures_are_in_the_page(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["full"])
    assert browser.run("return [...document.images].map((image) => image.naturalWidth)") == [32] * 24
    assert browser.run("return document.querySelectorAll('.samples .wrong b.bad').length") > 1


def test_values_show_under_the_pointer_and_the_arrow_keys(browser: Browser, pages: dict[str, Path]) -> None:
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By

    browser.open(pages["full"])
    chart = browser.driver.find_element(By.CSS_SELECTOR, "figure[data-chart=loss] svg")
    tip = browser.driver.find_element(By.CSS_SELECTOR, "figure[data-chart=loss] .tip")
    browser.run("arguments[0].scrollIntoView({block: 'center'})", chart)
    ActionChains(browser.driver).move_to_element(chart).perform()
    records = [json.loads(line) for line in (pages["full"].parent / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["train/loss"] for record in records if "train/loss" in record}
    step = int(tip.text.splitlines()[0].removeprefix("step "))
    assert f"{losses[step]:.4g}" in tip.text
    crossed = "return document.querySelectorAll('figure[data-chart=train-lr] .cross line').length"
    assert browser.run(crossed) == 1  # the other charts show the same step
    browser.run("arguments[0].focus()", chart)
    ActionChains(browser.driver).send_keys(Keys.ARROW_RIGHT).perform()
    assert tip.text.splitlines()[0] == f"step {step + 10}"
    ActionChains(browser.driver).move_by_offset(0, -300).perform()
    browser.run("document.activeElement.blur()")
    assert not tip.is_displayed()


def test_scale_and_legend_can_be_switched(browser: Browser, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.by import By

    browser.open(pages["full"])
    loss = browser.driver.find_element(By.CSS_SELECTOR, "figure[data-chart=loss]")
    path = "return arguments[0].querySelector('.line').getAttribute('d')"
    plain = browser.run(path, loss)
    browser.run("arguments[0].querySelector('button.log').click()", loss)
    assert browser.run(path, loss) != plain
    browser.run("arguments[0].querySelector('.legend button').click()", loss)
    assert browser.run("return arguments[0].querySelectorAll('.line').length", loss) == 1
    assert browser.messages() == []


def test_what_users_write_stays_text(browser: Browser, tmp_path: Path) -> None:
    classes = [EVIL, *map(str, range(9))]
    run = make_run(tmp_path / "run", EVIL, steps=100, notes=EVIL, classes=classes)
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + f"extra: {json.dumps({EVIL: EVIL})}\n")
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps({**environment, EVIL: EVIL, "command": [EVIL]}))
    summary = json.loads((run / "summary.json").read_text())
    advice = [{"rule": EVIL, "text": EVIL, "settings": {EVIL: EVIL}, "gain": 0.1}]
    (run / "summary.json").write_text(json.dumps({**summary, "advice": advice, "error": EVIL, "stopped_by": EVIL}))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, f"eval/{EVIL}": 1.0, f"system/0/{EVIL}": 2.0}) + "\n")
    for page in (write_report([run]), write_report([run, run], tmp_path / "two.html")):
        browser.open(page)
        assert browser.messages() == []
        assert EVIL in browser.run("return document.title")
        assert EVIL in browser.run("return document.querySelector('main').textContent")
        assert browser.run("return document.querySelectorAll('script').length") == 2
        assert browser.run("return document.querySelectorAll('img:not([src^=data])').length") == 0


def test_it_prints(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["full"])
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.run("return getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.driver.execute_cdp_cmd("Page.printToPDF", {})["data"].startswith("JVBERi")  # %PDF
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
