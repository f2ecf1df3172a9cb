"""The page in a browser: Debian's Chromium without a window, driven by playwright."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from camoxpert.pages.render import ENVIRONMENT
from camoxpert.serve.analysis import Analyst
from camoxpert.serve.answers import Fault

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# Colour and opacity of every pixel over the image.
OVERLAY = """async () => {
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  const canvas = document.getElementById("overlay"), {width, height} = canvas;
  return [height, width, [...canvas.getContext("2d").getImageData(0, 0, width, height).data]];
}"""
# A file as a drag or the clipboard carries it.
GIVE = """([event, kind, bytes, name]) => {
  const data = new DataTransfer();
  if (name) data.items.add(new File([new Uint8Array(bytes)], name));
  const given = event === "drop" ? {dataTransfer: data} : {clipboardData: data};
  document.dispatchEvent(new globalThis[kind](event, {...given, cancelable: true}));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine (apt-get install chromium)")
    with playwright.sync_playwright() as tool:
        found = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def asked(start: Callable[..., Any], predictor: Any, photo: Path) -> Any:
    """Return a server whose threshold divides the photo, which a tiny model hardly sees through."""
    middle = float(np.median(predictor.predict(photo).probability_HW))
    return start(Analyst(predictor, round(middle, 2)))


@pytest.fixture
def visit(browser, asked) -> Iterator[Callable[..., Any]]:
    """Return a function that opens the page; every complaint of the browser fails the test."""
    opened, complaints, elsewhere = [], [], []

    def note(request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.port != asked.server.port:
            elsewhere.append(request.url)

    def begin(width: int = 1200, height: int = 800) -> Any:
        page = browser.new_page(viewport={"width": width, "height": height}, accept_downloads=True)
        page.set_default_timeout(20_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", note)
        # Choosers are caught from now on: a wait for one may begin after a key has opened it.
        page.on("filechooser", lambda chooser: None)
        opened.append(page)
        page.goto(asked.server.url)
        return page

    yield begin
    for page in opened:
        page.close()
    # Lines about answers that are not a 2xx, and about the reading of pixels, which tests alone do.
    known = ("Failed to load resource", "willReadFrequently")
    assert [text for text in complaints if not any(part in text for part in known)] == []
    assert elsewhere == []


def overlay(page: Any) -> np.ndarray:
    height, width, values = page.evaluate(OVERLAY)
    return np.array(values, np.uint8).reshape(height, width, 4)


COUNT = """
const honest = CanvasRenderingContext2D.prototype.putImageData;
globalThis.redraws = 0;
CanvasRenderingContext2D.prototype.putImageData = function (...given) {
  globalThis.redraws++;
  return honest.apply(this, given);
};
const decode = HTMLImageElement.prototype.decode;
globalThis.decoded = 0;
HTMLImageElement.prototype.decode = function () {
  globalThis.decoded++;
  return decode.apply(this);
};
"""
MOVE = """async () => {
  const slider = document.getElementById("threshold"), before = [redraws, decoded];
  for (let value = 0; value <= 100; value++) {
    slider.value = value;
    slider.dispatchEvent(new Event("input"));
  }
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  return [redraws - before[0], decoded - before[1]];
}"""


def percent(share: float) -> str:
    return f"{100 * share:.{1 if share < 0.1 else 0}f} %"


def said(page: Any, text: str) -> None:
    # Not by a function: the page's policy lets no text become code.
    page.locator("#status", has_text=text).wait_for()


def show(page: Any, photo: Path) -> None:
    page.set_input_files("#file", photo)
    said(page, "done in")


def test_an_image_is_shown_as_the_api_says(visit, asked, photo: Path) -> None:
    page = visit()
    assert not page.is_visible("#result")
    show(page, photo)
    body = photo.read_bytes()
    mask = asked.post("/api/mask", body).pixels > 0
    assert mask.any() and not mask.all()
    drawn = overlay(page)
    assert np.array_equal(drawn[..., 3] > 0, mask)
    assert {tuple(pixel) for pixel in drawn[mask][:, :3].tolist()} <= {
        # An opacity of 45 % rounds the colour.
        (red, green, blue)
        for red in range(61, 66)
        for green in range(183, 188)
        for blue in range(78, 83)
    }
    found = asked.post("/api/predict", body).json
    assert page.inner_text("#share") == percent(found["object_fraction"])
    assert page.locator("#presence, #uncalibrated").count() == 0
    levels = page.locator("#experts .level").all()
    for shown, level in zip(levels, found["experts"], strict=True):
        text = shown.inner_text()
        assert level["level"] in text
        assert all(expert["name"] in text for expert in level["experts"])
    page.check("[value=image]")
    assert not overlay(page).any()
    page.check("[value=probability]")
    grey = overlay(page)
    assert (grey[..., 3] == 255).all()
    assert np.abs(grey[..., 0] / 255 - asked.post("/api/map", body).pixels / 255).max() < 0.015


def test_the_slider_and_the_keyboard(visit, asked, photo: Path) -> None:
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "choose"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(photo)
    said(page, "done in")
    first = asked.server.analyst.threshold
    assert page.inner_text("#threshold-value") == f"{first:.2f}"
    page.focus("#threshold")
    masks = []
    for key, moved in (("ArrowLeft", -0.01), ("ArrowRight", 0), ("ArrowRight", 0.01)):
        page.keyboard.press(key)
        drawn = overlay(page)[..., 3] > 0
        threshold = page.inner_text("#threshold-value")
        assert float(threshold) == pytest.approx(first + moved)
        masks.append(asked.post(f"/api/mask?threshold={threshold}", photo.read_bytes()).pixels > 0)
        assert np.array_equal(drawn, masks[-1])
        assert page.inner_text("#share") == percent(masks[-1].mean())
    assert masks[0].sum() > masks[2].sum()
    page.keyboard.press("Home")
    assert overlay(page)[..., 3].all() and page.inner_text("#share") == "100 %"
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert page.is_checked("[value=probability]")


def test_a_frame_has_one_redraw_and_decodes_nothing(visit, asked, photo: Path) -> None:
    page = visit()
    page.add_init_script(COUNT)
    page.reload()
    show(page, photo)
    assert page.evaluate(MOVE) == [1, 0]
    mask = asked.post("/api/mask?threshold=1", photo.read_bytes()).pixels > 0
    assert page.inner_text("#threshold-value") == "1.00"
    assert np.array_equal(overlay(page)[..., 3] > 0, mask)


@pytest.mark.parametrize("images", [0, 40])
def test_presence_is_shown_with_its_calibration(
    browser, start: Callable[..., Any], judging: Any, photo: Path, images: int
) -> None:
    model = judging(images)
    page = browser.new_page()
    page.goto(start(Analyst(model, 0.5)).server.url)
    show(page, photo)
    assert page.inner_text("#presence") == percent(model.predict(photo).presence)
    assert page.locator("#uncalibrated").is_visible() is (not images)
    page.close()


def test_bad_files_get_a_sentence_and_the_last_result_stays(visit, photo: Path, tmp_path) -> None:
    page = visit()
    bad = tmp_path / "<img src=x onerror=alert(1)>.jpg"
    bad.write_text("not an image")
    page.set_input_files("#file", bad)
    page.wait_for_selector("#error:visible")
    assert page.inner_text("#error") == "The file is not an image. Download it again."
    assert not page.is_visible("#result")
    show(page, photo)
    assert not page.is_visible("#error")
    large = tmp_path / "large.jpg"
    with large.open("wb") as file:
        file.truncate(20_000_001)
    page.set_input_files("#file", large)
    page.wait_for_selector("#error:visible")
    assert "20 MB" in page.inner_text("#error") and page.is_visible("#result")


def test_drop_and_paste(visit, photo: Path) -> None:
    page = visit()
    data = list(photo.read_bytes())
    for event, kind in (("drop", "DragEvent"), ("paste", "ClipboardEvent")):
        page.evaluate(GIVE, [event, kind, data, "photo.jpg"])
        said(page, "done in")
        assert overlay(page).any()
        page.evaluate(GIVE, [event, kind, [], ""])
        page.wait_for_selector("#error:visible")
        assert "not an image file" in page.inner_text("#error")


def test_downloads_are_those_of_the_api(visit, asked, photo: Path, tmp_path: Path) -> None:
    page = visit()
    named = tmp_path / "<b>frog.x.jpg"
    named.write_bytes(photo.read_bytes())
    show(page, named)
    page.focus("#threshold")
    page.keyboard.press("ArrowLeft")
    overlay(page)
    threshold = page.inner_text("#threshold-value")
    for kind, query in (("map", ""), ("mask", f"?threshold={threshold}"), ("cutout", "")):
        with page.expect_download() as download:
            page.click(f"[data-kind={kind}]")
        assert download.value.suggested_filename.endswith(f"frog.x-{kind}.png")
        saved = Path(download.value.path()).read_bytes()
        assert saved == asked.post(f"/api/{kind}{query}", photo.read_bytes()).body
    assert page.locator("#status b").count() == 0


def test_a_busy_server_is_asked_again(visit, asked, photo: Path) -> None:
    page = visit()
    answers: list[str] = []

    def busy() -> None:
        answers.append("asked")
        if len(answers) == 1:
            raise Fault(503, "Full.", (("Retry-After", "1"),))

    asked.server.worker.check_free = busy
    page.set_input_files("#file", photo)
    said(page, "again in")
    said(page, "done in")
    assert len(answers) == 2


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_cut_off(visit, photo: Path, width: int) -> None:
    page = visit(width, 844)
    show(page, photo)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for element in page.locator("button:visible, input:visible, h2:visible, .tile:visible").all():
        box = element.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    image, drawn = (page.locator(name).bounding_box() for name in ("#image", "#overlay"))
    assert image == drawn and image["height"] < 844
    for button in page.locator("button:visible").all():
        assert button.bounding_box()["height"] >= 40


def test_the_page_names_nothing_but_its_server() -> None:
    """Without a browser: what its files load."""
    for name in ("serve.html.j2", "serve.css", "serve.js"):
        source, _, _ = ENVIRONMENT.loader.get_source(ENVIRONMENT, name)
        assert "http:" not in source and "https:" not in source and "@import" not in source
        assert "innerHTML" not in source and "url(" not in source and "eval" not in source
