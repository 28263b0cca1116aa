"""The report page in a real Chromium, without a window: it is looked at, clicked and typed at as a reader does."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic import attack, defense

from sau.report.page import build

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
SCRIPT = "<script>document.title='run'</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium with its driver here; Debian has them as chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    alone = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses its sandbox to root
    for flag in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", *alone):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER)) as driver:
        yield driver


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two attacks, one with a name that is code, and an oracle."""
    root = tmp_path_factory.mktemp("page")
    for seed in (0, 1):
        attacked = attack(root / "record", "badnet", seed)
        for name, asr, der in (("sau", 2.0, 96.0), ("ft", 60.0, 70.0)):
            defense(attacked, name, seed, asr=asr + seed, der=der)
    defense(attacked, "anp", der=99.0, selection="oracle")
    attack(root / "record", SCRIPT, folder="odd_s0", asr=80.0)
    (root / "report.html").write_text(build(root / "record")[0])
    return root / "report.html"


def look(browser: Any, page: Path, width: int = 1600, scheme: str = "light") -> None:
    """Open the page afresh in a window of a size and a colour scheme."""
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get("about:blank")
    browser.get(page.as_uri())


def rows(browser: Any) -> list[list[str]]:
    """What the visible rows of the first leaderboard say."""
    shown = "[...document.querySelector('.board').tBodies].filter(body => !body.hidden)"
    return browser.execute_script(f"return {shown}.map(body => [...body.rows[0].cells].map(cell => cell.innerText))")


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1600, "light")])
def test_it_loads_without_errors_and_nothing_overflows(browser, page, width, scheme):
    look(browser, page, width, scheme)
    for button in browser.find_elements("css selector", ".board .open"):
        browser.execute_script("arguments[0].click()", button)
    assert browser.execute_script("return document.querySelectorAll('.detail:not([hidden])').length") == 5
    across, inner = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert across <= inner == width
    assert min(browser.execute_script("return [...document.querySelectorAll('img.plot')].map(x => x.naturalWidth)")) > 0
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (int(background[4:].split(",")[0]) < 60) is (scheme == "dark")
    assert browser.title != "run" and any(SCRIPT in row[0] for row in rows(browser))
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_sorting_filtering_and_opening(browser, page):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    look(browser, page)
    asr = browser.find_element("xpath", "//table[@class='board']//th[button[text()='ASR %']]")
    for order in ("ascending", "descending"):
        asr.find_element("tag name", "button").click()
        figures = [float(row[3].split()[0].strip(",")) for row in rows(browser)]
        assert asr.get_attribute("aria-sort") == order and figures == sorted(figures, reverse=order == "descending")
    browser.find_element("tag name", "body").send_keys("/")
    field = browser.switch_to.active_element
    field.send_keys("badnet SAU")
    assert [row[0].splitlines()[1] for row in rows(browser)] == ["sau"]
    field.send_keys(Keys.ESCAPE)
    body = browser.find_element("css selector", ".board > tbody[data-f^='badnet sau']")
    detail = body.find_element("css selector", ".detail")
    body.find_element("css selector", ".open").send_keys(Keys.ENTER)
    assert all(text in detail.text for text in ("Before: ACC 90.00", "defense/sau.py --result_file badnet_s0"))
    body.find_element("css selector", "td:nth-child(4)").click()
    assert not detail.is_displayed()
    browser.find_element("css selector", f".heat a[href='#{body.get_attribute('id')}']").send_keys(Keys.ENTER)
    WebDriverWait(browser, 10).until(lambda _: detail.is_displayed())  # the page hears of a new #id a little later
