"""The page in a real browser, at the widths of a phone and a desk, light and dark; `pytest -m browser` runs it."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flow_lightning.report.page.render import write_page
from tests.report.page.example import EVIL, write_run, write_text_run

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("rendered")]

FLAGS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
    *("disable-component-update", "disable-sync", "user-data-dir=profile"),
)
LOOKS = [(width, scheme) for width in (390, 1280) for scheme in ("light", "dark")]


@pytest.fixture
def browser():
    from selenium import webdriver  # the ordinary run has none

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    yield driver
    assert driver.get_log("browser") == []  # neither an error nor a refused request
    driver.quit()


def show(browser, folder, width=1280, scheme="light"):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(write_page(folder).absolute().as_uri())
    return browser.execute_script


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_the_page_fits_its_width_in_letters_that_can_be_read(browser, width, scheme):
    run = show(browser, write_run(Path("run")), width, scheme)
    run("for (const each of document.querySelectorAll('details')) each.open = true")
    assert run("return document.documentElement.scrollWidth") <= width
    sizes = """return [...document.querySelectorAll('body *')]
      .filter((each) => [...each.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim()))
      .filter((each) => each.getClientRects().length)
      .map((each) => { const to = each.getScreenCTM?.();
        return parseFloat(getComputedStyle(each).fontSize) * (to ? Math.hypot(to.a, to.b) : 1); })"""
    assert min(run(sizes)) >= 11.99
    picture = base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"])
    brightness = np.median(np.asarray(Image.open(io.BytesIO(picture)).convert("L")))
    assert brightness > 230 if scheme == "light" else brightness < 40


def test_names_with_markup_run_nothing_and_are_read_as_text(browser):
    run = show(browser, write_run(Path("run")))
    assert browser.title.endswith("run: report")
    assert run("return document.scripts.length") == 1
    assert EVIL in run("return document.querySelector('[data-index=\"3\"] dd + dt + dd').textContent")


def test_filters_show_a_list_and_a_class_and_the_indices_are_copied(browser):
    run = show(browser, write_run(Path("run")))
    shown = "return [...document.querySelectorAll('#part4 .card:not([hidden])')].map((card) => +card.dataset.index)"
    choose = """const field = document.querySelector(`#part4 [name=${arguments[0]}]`);
      field.selectedIndex = arguments[1]; field.dispatchEvent(new Event('change', {bubbles: true}))"""
    assert sorted(run(shown)) == [4, 5]
    run(choose, "list", 1)
    hardest = run(shown)
    assert {5, 26, 29} <= set(hardest) and 0 not in hardest
    run(
        choose,
        "class",
        [*run("return [...document.querySelectorAll('#part4 [name=class] option')].map((o) => o.text)")].index(EVIL),
    )
    assert run(shown) == [index for index in hardest if index % 3 == 0]
    rows = "return [...document.querySelectorAll('#part4 tbody tr:not([hidden])')].length"
    assert run(rows) == 10
    browser.find_element("css selector", "#part4 .copy").click()
    expected = "Copied: " + ", ".join(map(str, run(shown)))
    for _ in range(50):
        if (said := run("return document.querySelector('#part4 output').textContent")) == expected:
            break
    assert said == expected


def test_marks_say_what_they_are_to_mouse_and_keyboard_and_escape_hides_it(browser):
    from selenium.webdriver import ActionChains

    run = show(browser, write_run(Path("run")))
    tip = "const tip = document.getElementById('tip'); return tip.hidden ? null : tip.textContent"
    assert run(tip) is None
    mark = browser.find_element("css selector", "#part2 .mark")
    ActionChains(browser).scroll_to_element(mark).move_to_element(mark).perform()
    assert run(tip) == "alpha 0: kept 100.0\u00a0%, validation accuracy (%) 50"
    ActionChains(browser).send_keys("\ue00c").perform()  # Escape
    assert run(tip) is None
    run("arguments[0].focus()", browser.find_elements("css selector", "#part2 .mark")[1])
    assert run(tip).startswith("alpha 1")


def test_a_click_on_a_column_sorts_its_numbers_both_ways(browser):
    run = show(browser, write_run(Path("run")))
    run("document.querySelector('#part4 details').open = true")
    button = browser.find_elements("css selector", "#part4 .sort")[5]
    column = (
        "return [...document.querySelectorAll('#part4 tbody tr')].map((row) => parseFloat(row.cells[5].textContent))"
    )
    for order in (sorted, lambda values: sorted(values, reverse=True)):
        button.click()
        assert run(column) == order(run(column)) and len(run(column)) == 30


def test_tokens_of_a_text_are_darker_where_their_weight_is_higher(browser):
    run = show(browser, write_text_run(Path("run")))
    shades = """return [...document.querySelectorAll('[data-index="0"] .token')]
      .map((each) => parseFloat(getComputedStyle(each).backgroundColor.split(',')[3]))"""
    first, second, third = run(shades)
    assert first > second > third
    assert run("return document.querySelector('[data-index=\"0\"] .words').textContent").endswith(f"two and {EVIL}")
