"""The page in a real browser: sorting, filtering and comparing with mouse and keyboard, no errors.

Needs Debian's chromium and chromedriver (or Chrome's) on the PATH and the package selenium; skipped without them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_tools import PHONE, WIDE, needs_browser, resize, start_browser
from report_files import CONCEPTS, make_many, paint
from report_results import EVIL, make_results

from sd_unlearn.config.base import ReportConfig
from sd_unlearn.io.files import write_json
from sd_unlearn.report.report import run

pytest.importorskip("selenium", reason="selenium is not installed (pip install -e '.[dev]')")
pytestmark = needs_browser
VISIBLE = "return [...document.querySelectorAll(arguments[0])].filter(e => e.offsetParent !== null)"
BOTTOM = "e => e.getBoundingClientRect().bottom"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    driver = start_browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of three concepts with two LoRAs each, at three strengths."""
    folder = tmp_path_factory.mktemp("many")
    make_many(folder, side=64, each=8)
    return run(ReportConfig(run=folder, certificate=True))


@pytest.fixture
def page(browser: Any, many: Path) -> Iterator[Any]:
    show(browser, many)
    yield browser
    assert browser.get_log("browser") == []  # no error, no blocked script or image


def show(browser: Any, path: Path, size: tuple[int, int] = WIDE, dark: bool = False) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get_log("browser")
    resize(browser, size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": [scheme]})
    browser.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
    browser.get("about:blank")  # so that the checks below do not see the previous page
    browser.get(path.absolute().as_uri())
    loaded = "return location.protocol === 'file:' && document.readyState === 'complete'"
    WebDriverWait(browser, 30).until(lambda b: b.execute_script(loaded))


def one(browser: Any, query: str) -> Any:
    return browser.find_element("css selector", query)


def seen(browser: Any, query: str) -> list[Any]:
    """The elements that can be seen."""
    return browser.execute_script(VISIBLE, query)


def click(browser: Any, element: Any) -> None:
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    element.click()


def press(browser: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def choose(browser: Any, query: str, value: str) -> None:
    """Pick an option whatever characters its value has."""
    [option] = [o for o in one(browser, query).find_elements("tag name", "option") if o.get_attribute("value") == value]
    option.click()


def column(browser: Any, index: int) -> list[str]:
    cells = f"#compare-table tbody tr > :nth-child({index})"
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(e => e.dataset.value)", cells
    )


def head(browser: Any, name: str) -> tuple[Any, int]:
    """The button of a column and its number from 1."""
    buttons = browser.find_elements("css selector", "#compare-table thead button")
    number = [b.text.split("\n")[0].strip() for b in buttons].index(name)
    return buttons[number], number + 1


def test_a_click_sorts_a_column_and_the_keyboard_reverses_it(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    button, number = head(page, "Retention")
    click(page, button)
    cell = button.find_element("xpath", "..")
    assert cell.get_attribute("aria-sort") == "descending"  # the best first
    values = [float(v) for v in column(page, number) if v]
    assert values == sorted(values, reverse=True)
    assert [v == "" for v in column(page, number)] == [False] * 18 + [True] * 3  # the unmeasured last
    button.send_keys(Keys.ENTER)
    assert cell.get_attribute("aria-sort") == "ascending"
    values = [float(v) for v in column(page, number) if v]
    assert values == sorted(values)
    assert column(page, number)[-3:] == [""] * 3
    assert "Sorted by Retention, ascending." in one(page, "#compare-status").text
    click(page, head(page, "LoRA")[0])
    assert cell.get_attribute("aria-sort") is None
    assert column(page, 1) == sorted(column(page, 1))


def test_the_comparison_filters_by_concept_verdict_and_name(page: Any) -> None:
    status = one(page, "#compare-status")
    assert status.text == "18 of 18 lines shown."
    choose(page, "#compare-controls [data-filter=concept]", "brad-pitt")
    assert status.text == "6 of 18 lines shown."
    assert {e.get_attribute("data-concept") for e in seen(page, "#compare-table tbody tr")} == {"brad-pitt"}
    choose(page, "#compare-controls [data-filter=standing]", "gone")
    assert {e.text for e in seen(page, "#compare-table tbody .standing")} == {"Gone"}
    choose(page, "#compare-controls [data-filter=concept]", "")
    one(page, "#compare-controls [data-filter=text]").send_keys("RED-ink-t")
    assert status.text == "2 of 18 lines shown."
    one(page, "#compare-controls [data-filter=text]").send_keys("nothing such")
    assert seen(page, "#compare-table tbody tr") == []


def test_show_the_leaks(page: Any) -> None:
    total = len(page.find_elements("css selector", ".shot[data-subject]"))
    leaks = len(page.find_elements("css selector", ".shot[data-outcome=leak]"))
    assert 0 < leaks < total
    assert one(page, "#pair-status").text == f"{total} of {total} pairs shown."
    click(page, one(page, "a[data-show=leak]"))
    assert one(page, "#pair-status").text == f"{leaks} of {total} pairs shown."
    assert {e.get_attribute("data-outcome") for e in seen(page, ".shot[data-subject]")} == {"leak"}
    assert len(seen(page, ".shot[data-subject]")) == leaks
    assert seen(page, ".shelf h3")  # their headings stay
    choose(page, "#pair-controls [data-filter=subject]", "seven-noise@0.5")
    assert {e.get_attribute("data-subject") for e in seen(page, ".shot[data-subject]")} == {"seven-noise@0.5"}
    choose(page, "#pair-controls [data-filter=group]", "alike")
    assert one(page, "#pair-status").text == f"0 of {total} pairs shown."
    assert one(page, "#no-pairs").is_displayed()
    click(page, one(page, "input[name=outcome][value='']"))
    assert not one(page, "#no-pairs").is_displayed()
    assert {e.get_attribute("data-group") for e in seen(page, ".shelf")} == {"alike"}


def test_holding_an_image_shows_the_base(page: Any) -> None:
    from selenium.webdriver import ActionChains

    frame = seen(page, "button.frame")[0]
    card = frame.find_element("xpath", "./ancestor::li")
    base = card.find_element("css selector", ".shot.base img").get_attribute("src")
    own = frame.find_element("css selector", "img").get_attribute("src")
    assert own != base
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", frame)
    ActionChains(page).move_to_element(frame).click_and_hold().perform()
    assert frame.find_element("css selector", ".over img").get_attribute("src") == base
    assert frame.get_attribute("aria-pressed") == "true"
    ActionChains(page).release().perform()
    assert frame.find_elements("css selector", ".over") == []
    assert frame.get_attribute("aria-pressed") == "false"


def test_images_are_compared_by_keyboard(page: Any) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    assert len(page.find_elements("css selector", "button.frame[tabindex='0']")) == 1  # one stop, then arrows
    frames = seen(page, "button.frame")
    page.execute_script("arguments[0].focus()", frames[0])
    press(page, Keys.ARROW_RIGHT)
    assert page.switch_to.active_element == frames[1]
    ActionChains(page).key_down(Keys.SPACE).perform()
    assert frames[1].find_elements("css selector", ".over img")
    assert "without the LoRA" in one(page, "#pair-side").get_attribute("textContent")
    ActionChains(page).key_up(Keys.SPACE).perform()
    assert not frames[1].find_elements("css selector", ".over")
    press(page, Keys.END)
    assert page.switch_to.active_element == frames[-1]


def test_faces_are_boxed_and_blurred_on_request(page: Any) -> None:
    face = one(page, ".shelf[data-concept=brad-pitt] .face")
    assert face.value_of_css_property("border-top-color") == "rgba(255, 255, 255, 1)"
    click(page, one(page, "#boxes"))
    assert face.value_of_css_property("border-top-color") == "rgba(0, 0, 0, 0)"
    assert face.value_of_css_property("backdrop-filter") == "none"
    click(page, one(page, "#blur"))
    assert "blur" in face.value_of_css_property("backdrop-filter")


def test_a_point_of_the_scatter_shows_its_values_when_focused(page: Any) -> None:
    point = one(page, ".ask")
    tip = point.find_element("css selector", ".tip")
    assert tip.value_of_css_property("visibility") == "hidden"
    page.execute_script("arguments[0].focus()", point)
    assert tip.value_of_css_property("visibility") == "visible"
    assert "leakage 3.5 %" in tip.text


def test_light_and_dark(browser: Any, many: Path) -> None:
    def paper() -> str:
        return one(browser, "body").value_of_css_property("background-color")

    show(browser, many)
    light = paper()
    show(browser, many, dark=True)
    dark = paper()
    assert light != dark
    assert one(browser, "#theme").get_attribute("aria-pressed") == "true"
    one(browser, "#theme").click()
    assert paper() == light
    assert one(browser, "#theme").get_attribute("aria-pressed") == "false"
    assert browser.get_log("browser") == []


def test_every_control_and_image_has_a_name(page: Any) -> None:
    roles = {"button", "link", "combobox", "searchbox", "radio", "checkbox", "image", "img", "region", "table"}
    nodes = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    found = [n for n in nodes if not n.get("ignored") and n.get("role", {}).get("value") in roles]
    assert len(found) > 100
    assert [n for n in found if not n.get("name", {}).get("value")] == []
    marks = {n["role"]["value"] for n in nodes if not n.get("ignored")}
    assert {"main", "banner", "navigation", "contentinfo"} <= marks


def test_the_first_tab_skips_to_the_summary(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    press(page, Keys.TAB)
    assert page.switch_to.active_element.get_attribute("href").endswith("#summary")
    assert page.switch_to.active_element.rect["y"] >= 0


@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_nothing_is_wider_than_the_window(browser: Any, many: Path, size: tuple[int, int]) -> None:
    for path in (many, many.with_name("certificate.html")):
        show(browser, path, size)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]


def test_the_first_screen_has_the_verdict_and_four_pairs(browser: Any, many: Path) -> None:
    show(browser, many, (1440, 900))
    parts = "#summary, .examples .pair"
    bottoms = browser.execute_script(f"return [...document.querySelectorAll('{parts}')].map({BOTTOM})")
    assert len(bottoms) == 5
    assert max(bottoms) <= 900
    assert one(browser, "#about").rect["y"] > 900  # what was evaluated comes below


@pytest.mark.parametrize("size", [(1440, 900), PHONE])
def test_the_whole_comparison_can_be_read(browser: Any, many: Path, size: tuple[int, int]) -> None:
    """Without scrolling sideways, in the table or the page."""
    show(browser, many, size)
    cells = seen(browser, "#compare-table tbody td")
    assert len(cells) > 100
    assert max(cell.rect["x"] + cell.rect["width"] for cell in cells[:40]) <= size[0]


def test_without_scripts_everything_is_readable_and_controls_are_hidden(browser: Any, many: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(browser, many)
        assert seen(browser, ".controls") == []
        assert seen(browser, "#theme") == []
        assert len(seen(browser, "#compare-table tbody tr")) == 21
        assert seen(browser, "button") == []
        assert len(seen(browser, ".pair img")) > 100
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_print_unfolds_everything_and_hides_controls(page: Any) -> None:
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    page.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert page.find_elements("css selector", "details:not([open])") == []
    assert seen(page, ".controls") == []
    page.execute_script("dispatchEvent(new Event('afterprint'))")
    assert page.find_elements("css selector", "details:not([open])")


def test_each_certificate_is_one_printed_page(browser: Any, many: Path) -> None:
    import base64
    import re

    show(browser, many.with_name("certificate.html"))
    articles = len(browser.find_elements("css selector", "article"))
    assert articles == len(CONCEPTS) * 6
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
    assert len(re.findall(rb"/Type\s*/Page\b", base64.b64decode(printed["data"]))) == articles
    assert browser.get_log("browser") == []


def test_the_page_of_one_lora_has_no_errors(browser: Any, tmp_path: Path) -> None:
    for name in ("a", "b", "big"):
        paint(tmp_path / "images" / f"{name}.png", 32, len(name))
    write_json(tmp_path / "results.json", make_results())
    show(browser, run(ReportConfig(run=tmp_path)))
    assert one(browser, "h1").text == "Forgetting “seven”"
    assert one(browser, "#pair-status").text == "3 of 3 pairs shown."
    click(browser, one(browser, "input[name=outcome][value=leak]"))
    assert one(browser, "#pair-status").text == "1 of 3 pairs shown."
    assert browser.get_log("browser") == []


def test_hostile_names_are_shown_as_text(browser: Any, tmp_path: Path) -> None:
    bad = f'{EVIL}</script><img src=x onerror="alert(2)">\'"'
    results = make_many(tmp_path, side=32, each=1)
    concept, subject = results["concepts"][0], results["subjects"][1]
    for item, key in ((concept, "name"), (concept, "caption"), (subject, "name"), (results["cards"][0], "about")):
        item[key] = bad
    old = subject["id"]
    subject["id"] = bad
    for key in ("rows", "differences", "pairs"):
        for item in results[key]:
            item["subject"] = bad if item["subject"] == old else item["subject"]
    write_json(tmp_path / "results.json", results)
    show(browser, run(ReportConfig(run=tmp_path, certificate=True)))
    assert bad in one(browser, "h1").text
    choose(browser, "#pair-controls [data-filter=subject]", bad)
    assert {e.get_attribute("data-subject") for e in seen(browser, ".shot[data-subject]")} == {bad}
    assert browser.get_log("browser") == []
    show(browser, tmp_path / "certificate.html")
    assert bad in one(browser, "h1").text
    assert browser.get_log("browser") == []


def test_a_thousand_pairs_stay_under_15_mb_and_can_be_filtered(browser: Any, tmp_path: Path) -> None:
    results = make_many(tmp_path, side=32, each=1)
    sources = [paint(tmp_path / "images" / f"source-{i}.png", 256, i) for i in range(12)]
    pairs = []
    for i in range(1000):  # the worst case: no image of the base is shared
        names = [f"images/{side}-{i}.png" for side in ("base", "lora")]
        for j, name in enumerate(names):
            os.link(sources[(i + 5 * j) % len(sources)], tmp_path / name)
        pairs.append(results["pairs"][0] | {"seed": i, "base": names[0], "image": names[1], "leak": i % 10 == 0})
    write_json(tmp_path / "results.json", results | {"pairs": pairs})
    path = run(ReportConfig(run=tmp_path))
    assert 3e6 < path.stat().st_size < 15e6
    show(browser, path)
    click(browser, one(browser, "input[name=outcome][value=leak]"))
    assert one(browser, "#pair-status").text == "100 of 1,000 pairs shown."
    assert len(seen(browser, ".shot[data-subject]")) == 100
    assert browser.get_log("browser") == []
