"""The page of a report in a browser: quiet, usable, accessible."""

import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Starts headless Chromium, with or without JavaScript; skips where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no chromium and chromedriver here")
    started = []

    def start(*, javascript=True):
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        profile = tmp_path_factory.mktemp("profile")
        for flag in (
            *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
            *("disable-background-networking", "disable-component-update", "disable-sync"),
            *("disable-dev-shm-usage", f"user-data-dir={profile}", "window-size=1280,900"),
        ):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        if not javascript:
            content = {"profile.managed_default_content_settings.javascript": 2}
            options.add_experimental_option("prefs", content)
        service = webdriver.ChromeService(executable_path=driver)
        started.append(webdriver.Chrome(options=options, service=service))
        return started[-1]

    yield start
    for driver in started:
        driver.quit()


@pytest.fixture(scope="module")
def chromium(browser, page):
    """The page, opened."""
    driver = browser()
    driver.get(page.as_uri())
    return driver


def test_the_page_is_quiet_and_asks_for_nothing(chromium, page):
    assert chromium.get_log("browser") == []
    messages = [
        json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")
    ]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    asked = {s["request"]["url"] for s in sent if s["documentURL"] == page.as_uri()}
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}
    broken = "return [...document.images].filter(i => !i.naturalWidth).length"
    assert chromium.execute_script(broken) == 0


def test_a_click_on_the_matrix_shows_its_crops(chromium, study):
    labels, predicted = study.predictions.labels, study.predictions.predicted
    found = "return [...document.querySelectorAll('#selection li')].map(e => ({...e.dataset}))"
    chromium.find_element(
        "css selector", '#matrix td[data-true="1"][data-guess="2"] button'
    ).click()
    crops = chromium.execute_script(found)
    assert len(crops) == ((labels == 1) & (predicted == 2)).sum() == 3
    assert {(crop["true"], crop["guess"]) for crop in crops} == {("1", "2")}
    assert "3 of the crops" in chromium.find_element("id", "count").text
    assert chromium.switch_to.active_element.get_attribute("id") == "found"
    pressed = "#matrix [aria-pressed=true]"
    assert len(chromium.find_elements("css selector", pressed)) == 1

    choose = """const form = document.forms[0]; form[arguments[0]].value = arguments[1];
        form.dispatchEvent(new Event("change"))"""
    chromium.execute_script(choose, "true", "")
    chromium.execute_script(choose, "guess", "")
    chromium.execute_script(choose, "field", "class1/f2.png")
    crops = chromium.execute_script(found)
    assert [crop["field"] for crop in crops] == ["class1/f2.png"] * 4
    sure = [float(crop["sure"]) for crop in crops]
    assert sure == sorted(sure, reverse=True)
    chromium.execute_script(choose, "order", "1")
    assert [float(crop["sure"]) for crop in chromium.execute_script(found)] == sorted(sure)


def test_the_page_is_accessible(chromium):
    axe = ROOT / "node_modules" / "axe-core" / "axe.min.js"
    if not axe.exists():
        pytest.skip(f"{axe} is absent: npm install --no-save axe-core")
    chromium.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true })")
    chromium.execute_script(axe.read_text(encoding="utf-8"))
    run = "const done = arguments[0]; axe.run().then(found => done(found.violations))"
    violations = chromium.execute_async_script(run)
    told = [(v["id"], v["impact"], [n["html"][:200] for n in v["nodes"]][:3]) for v in violations]
    assert [v for v in told if v[1] in ("serious", "critical")] == []


def test_the_page_fits_a_telephone(chromium):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    # As the matrix of many classes, or of long names.
    chromium.execute_script("document.getElementById('matrix').style.minWidth = '60rem'")
    assert chromium.execute_script("return document.documentElement.scrollWidth") == 390


def test_without_javascript_all_is_there_but_the_browser_of_crops(browser, page):
    driver = browser(javascript=False)
    driver.get(page.as_uri())
    assert not driver.find_element("id", "browser").is_displayed()
    assert not driver.find_elements("css selector", "#matrix button")
    assert len(driver.find_elements("css selector", ".crops li")) == 72
    assert driver.find_element("css selector", ".lights li").is_displayed()
