"""The page in a real browser: it loads without an error, and a hover shows the image."""

import base64
import io
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from common.display import page, tables

NAMES = ["0", "one </script> & <b>two</b>", "2"]
COUNT = 30


@pytest.fixture(scope="module")
def text() -> str:
    """Three maps of 30 images, each of one gray: image n has the value 8·n."""
    random = np.random.default_rng(0)
    labels = np.arange(COUNT) % 3
    images = np.repeat(8 * np.arange(COUNT, dtype=np.uint8), 64).reshape(-1, 1, 8, 8)
    wrong = labels.copy()
    wrong[[4, 10]] = 0  # both are of class 1
    maps = [
        page.Map(title, "kNN 90 %", random.normal(size=(COUNT, 2)) * scale, predictions)
        for title, scale, predictions in (
            ("pixels", 1, None), ("good", 50, labels), ("bad", 0.01, wrong)
        )
    ]  # fmt: skip
    sheet = io.BytesIO()
    Image.new("RGB", (40, 20), "white").save(sheet, "PNG")
    return page.build(
        "Spaces of <digits>",
        ["a fact"],
        ["left out: runs/x & y"],
        [
            tables.Row("on test", ("good", "bad"), frozenset()),
            tables.Row("section", (), frozenset()),
            tables.Row("accuracy", ("99 %", "98 %"), frozenset({0})),
        ],
        sheet.getvalue(),
        maps,
        images,
        labels,
        NAMES,
        ["#ff0000", "#00ff00", "#0000ff"],
    )


@pytest.fixture(scope="module")
def browser():
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        reason = "no chromium: apt-get install chromium chromium-driver"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason} (.ci/run does)")
        pytest.skip(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,1200"):
        options.add_argument(word)
    # nothing is reachable, so whatever the page fetched would be an error in the console
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture
def opened(browser, text, tmp_path):
    from selenium.webdriver.support.ui import WebDriverWait

    (tmp_path / "index.html").write_text(text, encoding="utf-8")
    browser.get((tmp_path / "index.html").as_uri())
    WebDriverWait(browser, 30).until(lambda b: count_in(b))
    yield browser
    wrong = [e for e in browser.get_log("browser") if e["level"] not in ("INFO", "DEBUG")]
    assert wrong == []


def count_in(browser) -> str:
    return browser.execute_script("return document.getElementById('count').textContent")


PLACE = """
const [name, n] = arguments, document_ = Bokeh.documents[0];
const plot = document_.get_model_by_name("map" + name), view = Bokeh.index.find_one(plot);
const points = document_.get_model_by_name("points").data;
view.el.scrollIntoView({block: "center"});
const box = view.el.getBoundingClientRect();
return [box.left + view.frame.x_scale.compute(points["x" + name][n]),
        box.top + view.frame.y_scale.compute(points["y" + name][n])];
"""


def point_at(browser, x: float, y: float) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    chain = ActionChains(browser)
    chain.w3c_actions.pointer_action.move_to_location(round(x), round(y))
    chain.perform()


def hover(browser, map_number: int, image: int) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    point_at(browser, 2, 2)
    point_at(browser, *browser.execute_script(PLACE, map_number, image))
    shown = "return document.getElementById('card').className === 'on'"
    WebDriverWait(browser, 10).until(lambda b: b.execute_script(shown))


@pytest.mark.parametrize("map_number", [0, 1, 2])
def test_a_hover_shows_the_image_and_lights_it_up_in_every_map(opened, map_number):
    image = 10
    hover(opened, map_number, image)
    from selenium.webdriver.common.by import By

    card = opened.find_element(By.ID, "card")
    rows = [row.text for row in card.find_elements(By.TAG_NAME, "tr")]
    assert rows == [f"label {NAMES[1]}", f"good {NAMES[1]}", "bad 0"]
    assert [cell.text for cell in card.find_elements(By.CLASS_NAME, "wrong")] == ["0"]
    # what is seen in the card is the image, by its gray
    seen = Image.open(io.BytesIO(card.find_element(By.ID, "image").screenshot_as_png))
    gray = np.asarray(seen.convert("L"), float)[20:-20, 20:-20]
    assert abs(gray.mean() - 8 * image) < 4
    assert gray.std() < 2
    hovered = opened.execute_script(
        "const d = Bokeh.documents[0], at = (m) => d.get_model_by_name(m).data;"
        "const [one, all] = [at('hovered'), at('points')];"
        "return Object.keys(one).filter((k) => one[k][0] === all[k][10])"
    )
    assert set(hovered) == {"x0", "y0", "x1", "y1", "x2", "y2", "color"}
    point_at(opened, 2, 2)
    assert "on" not in card.get_attribute("class")


def test_switches_for_classes_and_mistakes(opened):
    from selenium.webdriver.common.by import By

    def shown() -> list[int]:
        script = "return Bokeh.documents[0].get_model_by_name('shown').booleans"
        return [n for n, is_shown in enumerate(opened.execute_script(script)) if is_shown]

    assert shown() == list(range(COUNT))
    boxes = opened.find_elements(By.CSS_SELECTOR, "[data-class]")
    boxes[1].click()
    assert shown() == [n for n in range(COUNT) if n % 3 != 1]
    assert count_in(opened) == "20 of 30 images"
    opened.find_element(By.ID, "none").click()
    assert shown() == []
    opened.find_element(By.ID, "all").click()
    opened.find_element(By.ID, "mistakes").click()
    assert shown() == [4, 10]
    boxes[1].click()
    assert shown() == []
    assert count_in(opened) == "0 of 30 images"


def test_names_are_text_and_not_markup(opened):
    from selenium.webdriver.common.by import By

    assert opened.title == "Spaces of <digits>"
    chips = [chip.text for chip in opened.find_elements(By.CLASS_NAME, "chip")]
    assert chips == [*NAMES, "only mistakes of any space"]
    assert opened.find_element(By.CLASS_NAME, "warning").text == "left out: runs/x & y"
    assert [cell.text for cell in opened.find_elements(By.CLASS_NAME, "best")] == ["99 %"]


def test_nothing_is_fetched_and_it_stays_small(text):
    assert len(text) < 2 * 2**20
    assert not re.findall(r"""<(?:script|link|img)[^>]*(?:src|href)=(?!["']?data:)""", text)


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32), (3, 64)])
def test_the_largest_page_is_below_ten_megabytes(channels, side):
    images = np.random.default_rng(0).integers(0, 256, (2000, channels, side, side), np.uint8)
    uri = page._atlas(images)  # noise: no image needs more
    assert len(uri) < 7.5 * 2**20
    atlas = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert atlas.size == (45 * min(side, page.THUMB),) * 2
