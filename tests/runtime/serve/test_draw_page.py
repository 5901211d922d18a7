"""Drawing on the page, in a real browser: what is drawn with the mouse is what the server is asked for, and what is shown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving import Served, serving

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -r requirements/dev.txt")
from browsing import chromium, contrasts, moves, opened, unlabelled  # noqa: E402
from playwright.sync_api import Browser, Page, expect  # noqa: E402

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def drawing(drawn_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("drawn") / "store", drawn_bundle) as running:
        yield running


def choose(page: Page, picture: Path) -> None:
    page.get_by_label(re.compile("^Image")).set_input_files(picture)
    expect(page.get_by_role("toolbar", name="Drawing")).to_be_visible()
    page.get_by_alt_text("The picture: still.png").evaluate("image => image.decode()")


def drag(page: Page, *points: tuple[float, float]) -> None:
    """With the mouse over the canvas; points from 0 to 1."""
    box = page.locator(".drop canvas").bounding_box()
    assert box is not None
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=10)
    page.mouse.up()


def last(served: Served) -> dict[str, Any]:
    job: dict[str, Any] = served.call("GET", "/v1/videos").json["data"][0]
    return served.until(job["id"], "completed")


def test_a_drag_and_a_brush_are_drawn_and_made(drawing: Served, browser: Browser, picture: Path, tmp_path: Path) -> None:
    with opened(browser, drawing.url) as page:
        choose(page, picture)  # 30 x 20, of which the middle 20 x 20 is kept
        text = page.get_by_label("Drag", exact=True)
        drag(page, (0.5, 0.5), (0.9, 0.5))
        first = text.input_value()
        (x, y), *_, (to, _) = [tuple(map(float, point.split(","))) for point in first.split(" ")]
        assert abs(x - 15) < 0.2 and abs(y - 10) < 0.2 and abs(to - 23) < 0.3 and len(first.split(" ")) <= 24
        drag(page, (0.28, 0.28))  # a click pins
        drawn = text.input_value().split("\n")
        assert drawn[0] == first and re.fullmatch(r"1[01]\.?\d*,[56]\.?\d*", drawn[1])
        drag(page, (0.1, 0.9), (0.2, 0.9))
        page.get_by_role("button", name="Undo").click()
        assert text.input_value().split("\n") == drawn
        page.get_by_role("toolbar", name="Drawing").get_by_role("button", name="Brush").click()
        drag(page, (0.25, 0.25), (0.5, 0.5), (0.9, 0.5))
        page.get_by_role("button", name="Make the video").click()
        shown = page.locator("#shown figure video")
        expect(shown).to_have_count(2)  # the video and its field
        assert moves(page, shown.nth(1))
        told = last(drawing)["motionrt"]
        assert told["request"]["drag"] == text.input_value().split("\n") and told["files"] == ["image", "brush"]
        path = tmp_path / "brush.png"
        path.write_bytes(drawing.call("GET", f"/v1/videos/{last(drawing)['id']}/input?name=brush").body)
        painted = np.asarray(Image.open(path).convert("RGBA"))[..., 3] > 127
        assert painted.shape == (32, 32) and painted[16, 16] and painted[8, 8]
        assert not painted[28].any() and not painted[4].any()
        # The same again, from the list; then without anything drawn.
        page.reload()
        page.get_by_role("button", name=re.compile("^Use again")).first.click()
        expect(text).to_have_value("\n".join(told["request"]["drag"]))
        page.get_by_label("Seed", exact=True).fill(str(told["seed"]))
        page.get_by_role("button", name="Make the video").click()
        expect(page.locator("#jobs li")).to_have_count(2)
        assert last(drawing)["motionrt"]["frames_sha256"] == told["frames_sha256"]
        page.get_by_role("button", name="Clear").click()
        page.get_by_role("button", name="Make the video").click()
        expect(page.locator("#jobs li")).to_have_count(3)
        assert "drag" not in last(drawing)["motionrt"]["request"] and last(drawing)["motionrt"]["files"] == ["image"]


def test_a_field_is_a_file_and_comes_again(drawing: Served, browser: Browser, picture: Path, tmp_path: Path) -> None:
    path = tmp_path / "field.npy"
    np.save(path, np.full((3, 2, 20, 30), 2.0))
    with opened(browser, drawing.url) as page:
        choose(page, picture)
        page.locator("#more summary").click()
        page.get_by_label("Field", exact=True).set_input_files(path)
        there = len(drawing.call("GET", "/v1/videos").json["data"])
        page.get_by_role("button", name="Make the video").click()
        expect(page.locator("#jobs li")).to_have_count(there + 1)  # not the videos of a test before
        expect(page.locator("#shown figure video")).to_have_count(2)
        told = last(drawing)["motionrt"]
        assert told["files"] == ["image", "field"]
        page.get_by_label("Field", exact=True).set_input_files([])
        page.locator("#shown").get_by_role("button", name="Use again").click()
        expect(page.get_by_label("Field", exact=True)).not_to_have_value("")
        page.get_by_label("Seed", exact=True).fill(str(told["seed"] + 1))
        count = page.locator("#jobs li").count()
        page.get_by_role("button", name="Make the video").click()
        expect(page.locator("#jobs li")).to_have_count(count + 1)
        again = last(drawing)["motionrt"]
        assert again["files"] == ["image", "field"] and again["frames_sha256"] == told["frames_sha256"]  # no seed changes it


def test_what_is_drawn_can_be_typed_and_what_is_wrong_is_said_beside_it(
    drawing: Served, browser: Browser, picture: Path
) -> None:
    with opened(browser, drawing.url, "400 (Bad Request)", viewport={"width": 360, "height": 740}) as page:
        choose(page, picture)
        page.get_by_label("Drag", exact=True).fill("1,1 9,9")  # beside what is kept
        page.get_by_role("button", name="Make the video").click()
        expect(page.locator("[data-field=drag] .error")).to_contain_text("drag 1 begins at (1, 1), outside of what is kept")
        assert page.evaluate("document.activeElement.getAttribute('aria-invalid')") == "true"
        page.get_by_label("Drag", exact=True).fill("12,10 20,10")
        page.get_by_role("button", name="Make the video").click()
        expect(page.locator("#shown figure video")).to_have_count(2)
        assert unlabelled(page) == [] and [line for line in contrasts(page) if line[0] < 4.5] == []
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        # Another picture: what was drawn on the one before is gone.
        page.get_by_label(re.compile("^Image")).set_input_files(picture)
        expect(page.get_by_label("Drag", exact=True)).to_have_value("")


def test_a_choice_is_one_of_its_options(recalling_bundle: Path, browser: Browser, picture: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "store", recalling_bundle) as served, opened(browser, served.url) as page:
        choose(page, picture)
        for one in page.locator("details").all():
            one.evaluate("details => { details.open = true; }")
        chosen = page.get_by_label("Retrieval")
        assert chosen.locator("option").all_inner_texts() == ["none", "direct", "start", "hints"]
        chosen.select_option("hints")
        page.get_by_role("button", name="Make the video").click()
        expect(page.locator("#shown figure video")).to_have_count(2)
        assert last(served)["motionrt"]["request"]["retrieval"] == "hints"
