"""The report page in a real Chromium, without a window: it is looked at, clicked and typed at as a reader does."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic import attack, defense, grid

from sau.report import scatter
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
    service = webdriver.ChromeService(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two attacks, one with a name that is code; an oracle, an unfinished and a damaged folder."""
    root = tmp_path_factory.mktemp("page")
    records = root / "record"
    for seed in (0, 1):
        attacked = attack(records, "badnet", seed, asr=98.0)
        for name, asr, der in (("sau", 2.0, 96.0), ("ft", 60.0, 70.0)):
            defense(attacked, name, seed, asr=asr + seed, der=der, risks=name == "sau")
    defense(records / "badnet_s0", "anp", der=99.0, selection="oracle")
    other = attack(records, SCRIPT, 0, folder="odd_s0", asr=80.0, rows=1)
    (defense(other, "sau") / "manifest.json").unlink()
    (defense(records / "badnet_s0", "clp") / "summary.json").write_text("{}")
    (root / "report.html").write_text(build(records)[0])
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
    code = """return [...document.querySelector('.board').tBodies].filter(body => !body.hidden)
        .map(body => [...body.rows[0].cells].map(cell => cell.innerText))"""
    return browser.execute_script(code)


def column(browser: Any, number: int) -> list[str]:
    return [row[number].split()[0] if row[number] else "" for row in rows(browser)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_it_loads_without_errors_and_nothing_overflows(browser, page, width, scheme):
    look(browser, page, width, scheme)
    for button in browser.find_elements("css selector", ".board .open"):
        browser.execute_script("arguments[0].click()", button)
    opened = browser.execute_script("return document.querySelectorAll('.detail:not([hidden])').length")
    assert opened == 7
    across, inner = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert across <= inner == width
    code = """return [...document.querySelectorAll('.inner')].filter(box => box.clientWidth)
        .every(box => box.getBoundingClientRect().right <= innerWidth && box.scrollWidth <= box.clientWidth)"""
    assert browser.execute_script(code)
    code = "return [...document.querySelectorAll('section svg')].map(one => one.getBoundingClientRect().width)"
    drawn = [shown for shown in browser.execute_script(code) if shown]
    assert drawn and min(drawn) * 11 / scatter.WIDTH > 9  # pixels: letters that can be read
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(value) for value in background[4:-1].split(",")) / 3
    assert brightness < 60 if scheme == "dark" else brightness > 200
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_a_name_that_is_code_stays_text(browser, page):
    look(browser, page)
    assert browser.title != "run" and len(browser.find_elements("css selector", "script")) == 1
    assert any(SCRIPT in row[0] for row in rows(browser))


def test_sorting_by_click_and_by_keyboard(browser, page):
    from selenium.webdriver.common.keys import Keys

    look(browser, page)
    asr, der = (
        browser.find_element("xpath", f"//table[@class='board']//th[button[text()='{name}']]")
        for name in ("ASR %", "DER %")
    )
    asr.find_element("tag name", "button").click()
    assert asr.get_attribute("aria-sort") == "ascending" and der.get_attribute("aria-sort") is None
    shown = column(browser, 3)
    figures = [float(value.strip(",")) for value in shown if value]
    assert figures == sorted(figures) and len(figures) == 5 and shown[-1] == ""
    asr.find_element("tag name", "button").click()
    figures = [float(value.strip(",")) for value in column(browser, 3) if value]
    assert figures == sorted(figures, reverse=True) and column(browser, 3)[-1] == ""
    der.find_element("tag name", "button").send_keys(Keys.ENTER)
    assert der.get_attribute("aria-sort") == "descending" and asr.get_attribute("aria-sort") is None
    assert [row[0].splitlines()[1] for row in rows(browser)][:2] == ["anp (oracle)", "sau"]


def test_filtering(browser, page):
    from selenium.webdriver.common.keys import Keys

    look(browser, page)
    assert len(rows(browser)) == 7
    browser.find_element("tag name", "body").send_keys("/")
    field = browser.switch_to.active_element
    assert field.get_attribute("id") == "filter"
    field.send_keys("badnet SAU")
    assert [row[0].splitlines()[1] for row in rows(browser)] == ["sau"]
    assert browser.find_element("id", "count").text == "1 of 7 rows"
    field.send_keys(Keys.ESCAPE)
    assert len(rows(browser)) == 7
    field.send_keys("unfinished")
    assert ["unfinished" in row[-1] for row in rows(browser)] == [True]
    field.send_keys(" oracle")
    assert rows(browser) == []


def test_the_drill_down_opens_by_click_by_keyboard_and_by_address(browser, page):
    from selenium.webdriver.common.keys import Keys

    look(browser, page)
    body = browser.find_element("css selector", ".board > tbody[data-f^='badnet sau']")
    detail, button = body.find_element("css selector", ".detail"), body.find_element("css selector", ".open")
    assert not detail.is_displayed() and button.get_attribute("aria-expanded") == "false"
    button.send_keys(Keys.ENTER)
    assert detail.is_displayed() and button.get_attribute("aria-expanded") == "true"
    for text in ("Before: ACC 90.00", "defense/sau.py --result_file badnet_s0", "Resolved settings"):
        assert text in detail.text
    body.find_element("css selector", "td:nth-child(4)").click()
    assert not detail.is_displayed()
    link = browser.find_element("css selector", f".heat a[href='#{body.get_attribute('id')}']")
    link.send_keys(Keys.ENTER)
    assert detail.is_displayed() and button == browser.switch_to.active_element


@pytest.mark.slow
def test_fifty_six_cells_of_three_seeds_take_ten_seconds_and_five_hundred_fit(browser, tmp_path):
    """56 x 3 are built in 10 s; 500 cells are below 5 MB and open in 2 s; of processor time, for others may run."""
    assert grid(tmp_path / "many", 8, 6, 3, rows=20, risks=True) == 56
    start = time.process_time()
    build(tmp_path / "many")
    assert time.process_time() - start < 10
    assert grid(tmp_path / "huge", 25, 19, 1, rows=100, risks=True) == 500
    text, _ = build(tmp_path / "huge")
    assert len(text.encode()) < 5_000_000
    (tmp_path / "huge.html").write_text(text)
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    look(browser, tmp_path / "huge.html")
    metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    assert next(one["value"] for one in metrics if one["name"] == "TaskDuration") < 2
    assert len(rows(browser)) == 500
