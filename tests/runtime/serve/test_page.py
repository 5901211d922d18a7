"""The page in a real browser: the path of somebody who comes for the first time, and of one with a keyboard or a phone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from serving import Served, serving

from motionrt.runtime.errors import InputError
from motionrt.runtime.serve.page import FILES, page_routes
from motionrt.runtime.serve.web.keys import Keys
from motionrt.runtime.serve.web.limits import PAGE_POLICY

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -r requirements/dev.txt")
from browsing import chromium, contrasts, moves, opened, pixels, unlabelled  # noqa: E402
from playwright.sync_api import Browser, Page, expect  # noqa: E402

DEMO = Path(__file__).resolve().parents[3] / "demo"
STILL = DEMO / "inputs" / "red_star.png"
PROMPT = "a red star bounces in place"


def test_the_page_is_small_and_each_file_is_sent() -> None:
    folder = DEMO.parent / "runtime" / "serve" / "page"
    assert {path.name for path in folder.iterdir() if path.suffix not in (".py", "") and path.is_file()} == set(FILES)
    assert sum((folder / name).stat().st_size for name in FILES) < 50 << 10
    sources = "".join((folder / name).read_text() for name in FILES)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|style=|https?://(?!www\.w3\.org)", sources)


def test_an_example_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"still\.txt' is no picture by its name; allowed are \.png"):
        page_routes({"a star": tmp_path / "still.txt"})
    with pytest.raises(InputError, match=r"still\.png' cannot be read: No such file"):
        page_routes({"a star": tmp_path / "still.png"})


def test_the_page_comes_with_its_policy_and_no_other_file_comes(served: Served) -> None:
    for path in ["/", *(f"/page/{name}" for name in FILES if name != "index.html")]:
        reply = served.call("GET", path)
        assert reply.status == 200 and reply.body, path
        assert (reply.headers["Content-Security-Policy"] == PAGE_POLICY) == (path == "/")
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert served.call("GET", path, headers={"If-None-Match": reply.headers["ETag"]}).status == 304
    for path in ("/page/__init__.py", "/page/%2e%2e/app.py", "/page/", "/page/example-0"):
        assert served.call("GET", path).status == 404


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


def fill(page: Page, prompt: str = PROMPT) -> None:
    """A still and a prompt, and the clips that they find."""
    page.get_by_label(re.compile("^Image")).set_input_files(STILL)
    page.get_by_label("Prompt", exact=True).fill(prompt)
    expect(page.locator("#clips .clip")).to_have_count(8)


def setting(page: Page, name: str, value: str) -> None:
    """A number of "More settings"."""
    if page.locator("#more:not([open])").count():
        page.locator("#more summary").click()
    page.get_by_label(f"{name}, as a number").fill(value)


def make(page: Page) -> None:
    page.get_by_role("button", name="Make the video").click()


@pytest.mark.browser
def test_a_still_moves(served: Served, browser: Browser) -> None:
    with opened(browser, served.url) as page:
        fill(page)
        assert moves(page, page.locator("#clips video").first)
        keys = "new KeyboardEvent('keydown', { key: 'Enter', ctrlKey: true })"
        page.evaluate(f"() => {{ for (const _ of [1, 2]) document.dispatchEvent({keys}); }}")  # held down: one video is made
        video = page.locator("#shown figure video")
        expect(video).to_have_count(1)
        assert len(served.call("GET", "/v1/videos").json["data"]) == 1
        assert moves(page, video) and video.evaluate("v => [v.videoWidth, v.videoHeight]") == [64, 64]
        expect(page.locator("#jobs li")).to_have_count(1)


@pytest.mark.browser
@pytest.mark.slow
def test_words_alone_make_a_video(guided_bundle: Path, guided_memory: Path, tmp_path: Path, browser: Browser) -> None:
    """For a bundle that takes no picture the page asks for none."""
    with serving(tmp_path / "store", guided_bundle, guided_memory) as running, opened(browser, running.url) as page:
        expect(page.locator("#form .drop")).to_have_count(0)
        make(page)
        expect(page.locator("#inputs .error")).to_have_text("Say what the video shows and how it moves.")
        page.get_by_label("Prompt", exact=True).fill("a red ball moves right")
        expect(page.locator("#clips .clip")).to_have_count(4)
        make(page)
        expect(page.locator("#shown figure video")).to_have_count(1)
        expect(page.locator("#shown .clip")).to_have_count(2)
        page.get_by_role("button", name="Compare with motion off").click()
        expect(page.locator("#shown figure video")).to_have_count(2)
        expect(page.locator("#jobs img")).to_have_count(2)
        assert unlabelled(page) == []


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with an example to begin with."""
    store = tmp_path_factory.mktemp("page") / "store"
    with serving(store, DEMO / "bundle", DEMO / "memory", f"--example={PROMPT}={STILL}") as running:
        yield running


@pytest.mark.browser
@pytest.mark.slow
def test_a_newcomers_path(fresh: Served, browser: Browser) -> None:
    with opened(browser, fresh.url) as page:
        # A still and a prompt by one click; clips that move, best first; one is dropped, another search adds one.
        page.locator("#examples button").click()
        expect(page.get_by_label("Prompt", exact=True)).to_have_value(PROMPT)
        expect(page.locator(".drop img")).to_be_visible()
        expect(page.locator("#clips .clip")).to_have_count(8)
        scores = [int(text.removesuffix(" %")) for text in page.locator("#clips .score").all_inner_texts()]
        assert scores == sorted(scores, reverse=True) and scores[0] > 50
        assert "cosine with the words: 0." in (page.locator("#clips .score").first.get_attribute("title") or "")
        clips = page.locator("#clips .clip")
        ids = [clip.get_attribute("data-clip") for clip in clips.all()]
        assert moves(page, clips.nth(5).locator("video"))
        expect(page.locator("#clips :checked")).to_have_count(4)
        clips.nth(1).get_by_role("checkbox").uncheck()
        expect(page.locator("#found")).to_contain_text("You keep 3 of")
        page.get_by_label("Search the memory").fill("slides straight to the left")
        expect(page.locator("#clips .caption", has_text="slides straight to the left").first).to_be_visible()
        added = page.locator("#clips .clip", has_text="slides straight to the left").first
        added.get_by_role("checkbox").check()
        wanted = [ids[0], ids[2], ids[3], added.get_attribute("data-clip")]
        # It is made of these, in this order, and plays.
        make(page)
        video = page.locator("#shown figure video")
        expect(video).to_have_count(1)
        assert moves(page, video)
        assert [clip.get_attribute("data-clip") for clip in page.locator("#shown .clip").all()] == wanted
        job = fresh.call("GET", "/v1/videos").json["data"][0]
        assert [str(one["id"]) for one in job["motionrt"]["references"]] == wanted
        expect(page.locator("#shown h3").last).to_have_text(re.compile(r"Made in \d+"))
        expect(page.locator("#shown .legend")).to_contain_text("Step")
        # The same without motion beside it: the same seed, other frames.
        page.get_by_role("button", name="Compare with motion off").click()
        expect(video).to_have_count(2)
        off = fresh.call("GET", "/v1/videos").json["data"][0]["motionrt"]
        assert off["request"]["motion_scale"] == 0 and off["seeds"] == job["motionrt"]["seeds"]
        page.get_by_role("button", name="Pause").click()
        page.get_by_label("Frame").fill("12")
        for one in video.all():
            one.evaluate("v => v.seeking && new Promise((done) => v.addEventListener('seeked', done, { once: true }))")
        assert pixels(video.nth(0)) != pixels(video.nth(1))
        expect(page.get_by_role("group", name="Player").locator("output")).to_have_text("13 / 17")
        # A reload loses nothing, and one click puts it back into the form.
        page.reload()
        expect(page.locator("#jobs li")).to_have_count(2)
        expect(video).to_have_count(2)
        expect(page.get_by_label("Prompt", exact=True)).to_have_value("")
        page.locator(f"[data-job={job['id']}]").get_by_role("button", name="Use again").click()
        expect(page.get_by_label("Prompt", exact=True)).to_have_value(PROMPT)
        expect(page.get_by_label("Seed", exact=True)).to_have_value(str(job["motionrt"]["seed"]))
        expect(page.locator(".drop img")).to_be_visible()
        kept = page.locator("#clips .clip", has=page.locator(":checked"))
        expect(kept).to_have_count(4)
        ids = [clip.get_attribute("data-clip") for clip in kept.all()]
        assert ids == [wanted[3], *wanted[:3]]  # the one that the prompt does not find comes first
        make(page)
        expect(page.locator("#jobs li")).to_have_count(3)
        expect(page.locator("#shown figure video")).to_have_count(1)
        again = fresh.call("GET", "/v1/videos").json["data"][0]["motionrt"]
        assert again["frames_sha256"] == job["motionrt"]["frames_sha256"]


FIRST_PICTURE = """() => {
    const place = document.querySelector("#shown");
    window.box = (image) => {
        const { x, y, width, height } = image.getBoundingClientRect();
        return [x, y - place.getBoundingClientRect().y, width, height];
    };
    new MutationObserver((_, watch) => {
        const image = place.querySelector("figure img");
        if (!image) return;
        watch.disconnect();
        window.first = [image.alt, ...window.box(image)];
    }).observe(place, { childList: true, subtree: true });
}"""


@pytest.mark.browser
@pytest.mark.slow
def test_a_preview_takes_the_place_of_the_still_and_nothing_jumps(fresh: Served, browser: Browser, tmp_path: Path) -> None:
    wide = tmp_path / "wide.png"
    Image.new("RGB", (90, 30), "red").save(wide)
    with opened(browser, fresh.url) as page:
        fill(page)
        page.get_by_label(re.compile("^Image")).set_input_files(wide)  # not of the video's shape
        setting(page, "Steps", "50")
        page.get_by_label("Videos", exact=True).select_option("8")
        page.evaluate(FIRST_PICTURE)  # of a job that is quick, the first preview is there before a look from outside
        make(page)
        shown = page.locator("#shown figure img")
        expect(shown).to_have_attribute("alt", re.compile(r"^Preview, step \d+$"))
        alt, *before = page.evaluate("window.first")
        first = shown.get_attribute("alt")
        size = "image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])"
        assert alt == "" and shown.evaluate("image => window.box(image)") == before
        assert shown.evaluate(size) == [96, 96]
        expect(page.locator("#jobs li").first.locator("img")).to_have_attribute("alt", re.compile("^Preview, step"))
        expect(shown).not_to_have_attribute("alt", first or "")
        expect(shown).to_have_attribute("alt", re.compile("^Preview, step"))
        page.locator("#shown").get_by_role("button", name="Cancel").click()
        expect(page.locator("#shown .error")).to_have_text("You stopped it.")
        expect(page.locator("img[alt^=Preview]")).to_have_count(0)


@pytest.mark.browser
@pytest.mark.slow
def test_progress_is_seen_and_a_stop_stops(fresh: Served, browser: Browser) -> None:
    text = "<b>slides</b> up"
    with opened(browser, fresh.url) as page:
        fill(page, text)
        setting(page, "Steps", "50")
        page.get_by_label("Videos", exact=True).select_option("8")
        make(page)
        state = page.locator("#shown .state")
        expect(state).to_have_text(re.compile(r"Denoising · step \d+ of 400 · about \d"))
        expect(page.locator("#shown .prompt")).to_have_text(text)
        first = int(re.findall(r"step (\d+)", state.inner_text())[0])
        expect(state).to_have_text(re.compile(rf"step (?!{first} )"))
        assert int(re.findall(r"step (\d+)", state.inner_text())[0]) > first
        expect(page.locator("#shown .clip")).to_have_count(4)
        assert page.title() != "MotionRT"
        # A second one waits behind it and says so.
        make(page)
        expect(page.locator("#shown .state")).to_have_text(re.compile("Waiting, next in line"))
        waiting = page.locator("#jobs li").first
        waiting.get_by_role("button", name="Cancel").click()
        expect(page.locator("#shown")).to_contain_text("You stopped it.")
        running = page.locator("#jobs li").nth(1)
        running.locator(".open").click()
        page.locator("#shown").get_by_role("button", name="Cancel").click()
        expect(page.locator("#shown")).to_contain_text("You stopped it.")
        expect(running).to_contain_text("Cancelled")
        ended = fresh.call("GET", "/v1/videos").json["data"][:2]
        assert [one["error"]["code"] for one in ended] == ["cancelled", "cancelled"]
        assert fresh.call("GET", "/health/ready").status == 200
        page.on("dialog", lambda dialog: dialog.accept())
        page.locator("#shown").get_by_role("button", name="Delete").click()
        expect(page.locator(f"[data-job={ended[1]['id']}]")).to_have_count(0)


@pytest.mark.browser
@pytest.mark.slow
def test_seeds_lie_side_by_side_and_one_is_used_again(fresh: Served, browser: Browser) -> None:
    with opened(browser, fresh.url) as page:
        fill(page)
        page.get_by_role("button", name="Roll a seed").click()
        seed = int(page.get_by_label("Seed", exact=True).input_value())
        page.get_by_label("Videos", exact=True).select_option("2")
        make(page)
        expect(page.locator("#shown figure video")).to_have_count(2)
        page.get_by_role("button", name=f"Reuse Video, seed {seed + 1}").click()
        expect(page.get_by_label("Seed", exact=True)).to_have_value(str(seed + 1))
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Save Video, seed {seed}", exact=True).click()
        assert download.value.suggested_filename.endswith(f"-{seed}.mp4")


@pytest.mark.browser
@pytest.mark.slow
def test_what_is_wrong_is_said_where_it_is(fresh: Served, browser: Browser, tmp_path: Path) -> None:
    with opened(browser, fresh.url, "400 (Bad Request)") as page:
        make(page)
        expect(page.locator("[data-field=image] .error")).to_have_text("Choose a picture.")
        wrong = tmp_path / "no.png"
        wrong.write_bytes(b"no picture")
        page.get_by_label(re.compile("^Image")).set_input_files(wrong)
        expect(page.locator("[data-field=image] .error")).to_contain_text("cannot be read")
        fill(page)
        setting(page, "Steps", "99")
        make(page)
        expect(page.locator("[data-field=steps] .error")).to_contain_text("99")
        assert page.evaluate("document.activeElement.getAttribute('aria-invalid')") == "true"
        # No clip is kept: the motion is off.
        setting(page, "Steps", "8")
        for clip in page.locator("#clips .clip").all()[:4]:
            clip.get_by_role("checkbox").uncheck()
        expect(page.locator("#found")).to_have_text("No clip is kept: the motion is off.")
        make(page)
        expect(page.locator("#shown figure strong", has_text="Motion off")).to_be_visible()
        assert fresh.call("GET", "/v1/videos").json["data"][0]["motionrt"]["request"]["motion_scale"] == 0


@pytest.mark.browser
@pytest.mark.slow
def test_clips_that_are_not_likely_are_not_ticked_and_not_used(fresh: Served, browser: Browser) -> None:
    with opened(browser, fresh.url) as page:
        fill(page, "a recipe for soup")
        clips = page.locator("#clips").get_by_role("checkbox")
        expect(page.locator("#found")).to_have_text("There is nothing like it. Tick what fits nevertheless.")
        assert not any(clip.is_checked() for clip in clips.all())
        make(page)
        expect(page.locator("#shown figure video")).to_be_visible()
        assert fresh.call("GET", "/v1/videos").json["data"][0]["motionrt"]["references"] == []
        page.get_by_label("Search the memory", exact=True).fill("another recipe for soup")  # for the clips alone
        make(page)
        expect(page.locator("#shown figure strong", has_text="Motion off")).to_be_visible()
        clips.nth(1).check()
        expect(page.locator("#found")).to_have_text("You keep 1 of at most 8.")
        page.get_by_label("Search the memory", exact=True).fill("")
        page.get_by_label("Prompt", exact=True).fill(PROMPT)
        page.get_by_role("button", name="Use the best").click()
        expect(page.locator("#found")).to_contain_text("The 4 best of 192 clips are used.")


@pytest.mark.browser
@pytest.mark.slow
def test_a_key_is_asked_for_and_kept_in_the_tab(tmp_path: Path, browser: Browser) -> None:
    file = tmp_path / "keys.json"
    key = Keys.open(file, new=True).create("alice", ["generate"])
    with (
        serving(tmp_path / "store", DEMO / "bundle", DEMO / "memory", f"--keys={file}", key=key) as guarded,
        opened(browser, guarded.url, "401 (Unauthorized)") as page,
    ):
        dialog = page.get_by_role("dialog", name="API key")
        dialog.get_by_label("Key", exact=True).fill("mrt_wrong")
        dialog.get_by_role("button", name="Go on").click()
        expect(dialog.get_by_text("The server does not take this key.")).to_be_visible()
        dialog.get_by_label("Key", exact=True).press_sequentially(key)
        page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        fill(page)
        assert moves(page, page.locator("#clips video").first)  # by a signed link: a video sends no header
        make(page)
        assert moves(page, page.locator("#shown figure video"))
        page.reload()
        expect(page.locator("#jobs li")).to_have_count(1)
        expect(dialog).to_be_hidden()
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        # A video that is opened later is shown by new links: those of the list have expired, here with the server.
        for _ in range(2):
            guarded.until(guarded.create(STILL)["id"], "completed")
        page.reload()
        expect(page.locator("#jobs li")).to_have_count(3)
        page.wait_for_load_state("networkidle")  # a server that is stopped answers 503 to what is under way
        guarded.stop()
        guarded.start()
        page.locator("#jobs .open").nth(1).click()
        assert moves(page, page.locator("#shown figure video"))


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (360, "light"), (360, "dark")])
def test_all_can_read_and_reach_it(fresh: Served, browser: Browser, width: int, scheme: str) -> None:
    with opened(browser, fresh.url, viewport={"width": width, "height": 740}, color_scheme=scheme) as page:
        fill(page)
        page.locator("#more summary").click()
        make(page)
        expect(page.locator("#shown figure video").first).to_be_visible()
        assert unlabelled(page) == []
        low = [line for line in contrasts(page) if line[0] < 4.5]
        assert low == [] and len(contrasts(page)) > 50
        assert page.evaluate("document.documentElement.scrollWidth") == width
        # What is said only to those who do not see takes no room.
        expect(page.locator("#live")).to_contain_text("done")
        below = "document.documentElement.scrollHeight - scrollY - document.querySelector('#history').getBoundingClientRect()"
        assert page.evaluate(f"{below}.bottom") < 60
        back = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert (max(int(part) for part in re.findall(r"\d+", back)[:3]) < 60) == (scheme == "dark")


@pytest.mark.browser
@pytest.mark.slow
def test_the_keyboard_alone_will_do(fresh: Served, browser: Browser) -> None:
    with opened(browser, fresh.url) as page:
        fill(page)
        page.locator("#examples button").focus()
        order = []
        for _ in range(16):
            order.append(page.evaluate("(e => e.id || e.ariaLabel || e.textContent)(document.activeElement)"))
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none" or order[-1] == "file"
            page.keyboard.press("Tab")
        places = page.evaluate(
            "(() => [...document.querySelectorAll('#form button, #form input, #form textarea, #form select')]"
            ".filter((e) => e.checkVisibility() && !e.disabled).map((e) => e.id || e.ariaLabel || e.textContent))()"
        )
        assert order == places[: len(order)]
        # Keep or drop a clip, and make the video, without a pointer.
        page.locator("#clips input").first.focus()
        page.keyboard.press("Space")
        expect(page.locator("#found")).to_contain_text("You keep 3 of")
        count = page.locator("#jobs li").count()
        page.keyboard.press("Control+Enter")
        expect(page.locator("#jobs li")).to_have_count(count + 1)
        expect(page.locator("#shown figure video").first).to_be_visible()


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_picture_is_dropped_or_pasted(fresh: Served, browser: Browser, way: str) -> None:
    send = """([way, bytes]) => {
      const data = new DataTransfer();
      data.items.add(new File([new Uint8Array(bytes)], "still.png", { type: "image/png" }));
      const options = { bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data };
      document.body.dispatchEvent(way === "drop" ? new DragEvent(way, options) : new ClipboardEvent(way, options));
    }"""
    with opened(browser, fresh.url) as page:
        expect(page.get_by_role("button", name="Make the video")).to_be_enabled()
        page.evaluate(send, [way, list(STILL.read_bytes())])
        picture = page.get_by_alt_text("The picture: still.png")
        expect(picture).to_be_visible()
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0


@pytest.mark.browser
@pytest.mark.slow
def test_a_stream_that_cannot_be_had_loses_nothing(fresh: Served, browser: Browser) -> None:
    with opened(browser, fresh.url, "net::ERR_FAILED") as page:
        page.route("**/events*", lambda route: route.abort())
        fill(page)
        setting(page, "Steps", "50")
        page.get_by_label("Videos", exact=True).select_option("4")
        make(page)
        expect(page.locator("#shown .state")).to_contain_text("step")
        expect(page.locator("#shown figure video")).to_have_count(4, timeout=30_000)


@pytest.mark.browser
@pytest.mark.slow
def test_a_long_list_is_shown_in_part_and_kept_up_to_date(tmp_path: Path, browser: Browser) -> None:
    with serving(tmp_path / "store", DEMO / "bundle", DEMO / "memory") as many, opened(browser, many.url) as page:
        for _ in range(25):
            many.create(STILL, prompt=PROMPT, steps=20)
        page.reload()
        expect(page.locator("#jobs li")).to_have_count(24)
        expect(page.locator("#jobs progress")).to_have_count(0, timeout=60_000)  # with two streams for all
        page.get_by_role("button", name="Show older ones").click()
        expect(page.locator("#jobs li")).to_have_count(25)
        expect(page.get_by_role("button", name="Show older ones")).to_be_hidden()
