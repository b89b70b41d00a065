"""The page of `sd-unlearn ui` in a real browser: choose a LoRA, move the slider, see the image change."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from browser_tools import PHONE, WIDE, needs_browser, resize, start_browser
from evaluation_runs import make_run

pytest.importorskip("selenium", reason="selenium is not installed (pip install -e '.[dev]')")
pytest.importorskip("gradio", reason="Gradio is not installed (pip install -e '.[ui]')")
pytestmark = [pytest.mark.slow, needs_browser]
PATIENCE = 180.0  # seconds
SOURCE = "return document.querySelector('#{} img')?.src"
MOVE = """
const range = document.querySelector('#strength input[type=range]');
range.value = arguments[0];
for (const event of ['input', 'change', 'pointerup']) range.dispatchEvent(new Event(event, {bubbles: true}));
"""
FOREIGN = """
return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith(location.origin)
    && !n.startsWith('data:') && !n.startsWith('blob:'))
"""


@pytest.fixture(scope="module")
def address(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page of a folder with two runs."""
    root = tmp_path_factory.mktemp("page")
    make_run(root / "runs" / "four", tiny_base, "four", 1)
    make_run(root / "runs" / "seven", tiny_base)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sd_unlearn", "ui", "--port", str(port)]
    process = subprocess.Popen(command, cwd=root, env=os.environ)
    url = f"http://127.0.0.1:{port}/"
    try:
        until(lambda: answers(url) or process.poll() is not None)
        assert process.poll() is None
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def answers(url: str) -> bool:
    try:
        with urlopen(url):
            return True
    except OSError:
        return False


def until(condition: Any) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.2)
    pytest.fail(f"did not happen within {PATIENCE:g} seconds")


@pytest.fixture
def browser(address: str, tmp_path: Path) -> Iterator[Any]:
    driver = start_browser(tmp_path / "profile")
    driver.get(address)
    yield driver
    errors = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    driver.quit()
    assert errors == []


def value_of(browser: Any, name: str) -> str:
    return str(browser.execute_script(f"return document.querySelector('#{name} textarea')?.value ?? ''"))


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_choosing_a_lora_and_moving_the_slider_change_the_image(browser: Any, size: tuple[int, int]) -> None:
    from selenium.webdriver.common.by import By

    resize(browser, size)
    until(lambda: browser.find_elements(By.CSS_SELECTOR, "#loras input"))
    assert "runs/four" in browser.find_element(By.ID, "loras").text  # the first run is chosen
    browser.find_element(By.CSS_SELECTOR, "#loras input").click()
    option = until(lambda: browser.find_elements(By.CSS_SELECTOR, "ul[role=listbox] li[aria-label='runs/seven']"))[0]
    browser.execute_script("arguments[0].dispatchEvent(new MouseEvent('mousedown', {bubbles: true}))", option)
    until(lambda: "runs/seven" in browser.find_element(By.ID, "loras").text)
    first = until(lambda: browser.execute_script(SOURCE.format("with-image")))  # generated when it was chosen
    base = until(lambda: browser.execute_script(SOURCE.format("base-image")))
    assert first != base
    reading = until(lambda: value_of(browser, "with-reading"))
    assert {
        line.partition(",")[0].removeprefix("does not show ").removeprefix("shows ") for line in reading.split("\n")
    } == {
        "four",
        "seven",
    }
    browser.execute_script(MOVE, 0.3)
    moved = until(lambda: (src := browser.execute_script(SOURCE.format("with-image"))) != first and src)
    assert browser.execute_script(SOURCE.format("base-image")) == base
    browser.execute_script(MOVE, 0)
    until(lambda: browser.execute_script(SOURCE.format("with-image")) not in (first, moved))
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.execute_script(FOREIGN) == []  # nothing comes from another host
    if folder := os.environ.get("SCREENSHOTS"):
        browser.save_screenshot(f"{folder}/ui-{size[0]}.png")


def test_a_training_starts_only_after_its_plan(browser: Any) -> None:
    from selenium.webdriver.common.by import By

    resize(browser, WIDE)
    tabs = until(lambda: browser.find_elements(By.CSS_SELECTOR, "button[role=tab]"))
    next(tab for tab in tabs if tab.text == "Train").click()
    start = until(lambda: browser.find_elements(By.ID, "start"))[0]
    assert not start.is_enabled()
    browser.find_element(By.ID, "plan").click()
    until(lambda: "Predicted memory" in browser.find_element(By.ID, "plan-text").text)
    until(start.is_enabled)
    steps = browser.find_element(By.CSS_SELECTOR, "#steps input")
    steps.clear()
    steps.send_keys("7")
    until(lambda: not start.is_enabled())  # what is started is what was planned
