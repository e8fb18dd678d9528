"""The page: complete in itself, safe with any name, and usable in a real browser."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise

import cv2
import numpy as np
import pytest

from cmpose.report.page import Report, Table, embedded_json, render, thinned
from tests import browser
from tests.viz.samples import report


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(report()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chromium():
    with browser.open_browser() as opened:
        yield opened


# -- the file --------------------------------------------------------------------------------------


def test_it_needs_nothing_else(page):
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"https?:|//\w+\.\w+/|@import|url\(", text)
    for reference in re.findall(r'\b(?:src|href)="([^"]*)"', text):
        assert reference.startswith(("data:", "#")), reference
    assert "default-src 'none'" in text
    assert "{{" not in text
    assert len(text) < 1_000_000
    for image in re.findall(r"<img [^>]*>", text):
        assert re.search(r'alt="[^"]+"', image), image[-80:]


def test_names_cannot_break_out(page):
    text = page.read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert text.count("</script>") == 2  # the data's and the script's own
    hostile = {"</script><!--": "\u2028<script>"}
    assert "<" not in embedded_json(hostile)
    assert json.loads(embedded_json(hostile)) == hostile


def test_absent_parts_are_said():
    parts = ("curves", "ap", "clips", "tokens")
    text = render(Report("Run", "r", "l", absent={part: f"no <{part}> here" for part in parts}))
    for part in parts:
        assert f'<p class="absent">no &lt;{part}&gt; here</p>' in text
    assert "<h2" not in render(Report("Run", "r", "l")), "no part without anything in it"
    assert '<div id="explorer"' not in text


def test_long_curves_are_averaged():
    assert thinned([(1.0, 2.0)]) == [(1.0, 2.0)]
    points = [(float(x), float(x % 2)) for x in range(1001)]
    short = thinned(points)
    assert len(short) <= 400
    assert short[0] == (2.0, pytest.approx(1 / 3))
    assert short[-1][0] == 1000.0
    chart = replace(report().charts[1], lines=[replace(report().charts[1].lines[0], points=points)])
    assert "Each point is the mean of 3 logged ones." in render(replace(report(), charts=[chart]))


# -- in a browser ----------------------------------------------------------------------------------


def shown(opened, state: str) -> None:
    """Waits until clip/frame/keypoint is what the pictures show."""
    opened.wait_for_selector(f'#explorer[data-shown="{state}"]')


def pixels(opened) -> list[str]:
    """What the three canvases hold."""
    return opened.eval_on_selector_all(".panel canvas", "all => all.map(c => c.toDataURL())")


def picture(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)


def clean(watch: browser.Watch) -> None:
    assert watch.messages == []
    assert watch.requests == []


def test_keypoints_frames_and_clips(chromium, page):
    with browser.open_page(chromium, page, viewport={"width": 1280, "height": 900}) as (tab, watch):
        shown(tab, "0/1/0")
        assert tab.inner_text("h1") == "<script>alert(1)</script>"
        assert "frame 1" in tab.inner_text("#frame-name")
        pictures = [pixels(tab)]
        assert len(set(pictures[0])) == 3

        tab.click("#keypoints button:has-text('left knee')")  # another keypoint: all three change
        shown(tab, "0/1/4")
        pictures.append(pixels(tab))
        assert "Left knee: heatmap maximum" in tab.inner_text("#reading")
        assert "head sizes from the truth" in tab.inner_text("#reading")
        pressed = tab.locator("#keypoints button[aria-pressed=true]")
        assert pressed.all_inner_texts() == ["left knee"]

        tab.focus("#frame")  # another frame, by the keyboard
        tab.keyboard.press("ArrowRight")
        shown(tab, "0/2/4")
        pictures.append(pixels(tab))
        tab.locator("#frame").fill("0")
        shown(tab, "0/0/4")
        assert "1 of 3: frame 0" in tab.inner_text("#frame-name")
        pictures.append(pixels(tab))

        tab.click("#clips button[data-clip='1']")  # a tile opens its clip
        shown(tab, "1/1/4")
        pictures.append(pixels(tab))
        tab.select_option("#clip", "0")
        shown(tab, "0/1/4")
        for before, after in pairwise(pictures):
            for panel in range(3):
                assert before[panel] != after[panel]

        keypoint = report().clips[0].frames[1].record["keypoints"][9]  # a click on the picture
        canvas = tab.locator("#panel-causal canvas")
        box = canvas.bounding_box()
        x, y = (
            (keypoint[axis] + 0.5) / count * box[side]
            for axis, (count, side) in enumerate(((96, "width"), (128, "height")))
        )
        canvas.click(position={"x": x, "y": y})  # once it stands still: the page may scroll
        shown(tab, "0/1/9")

        before = pixels(tab)
        for name in ("pose", "truth"):
            tab.click(f"#draw-{name}")
            shown(tab, "0/1/9")
        tab.wait_for_function(
            "old => document.querySelector('.panel canvas').toDataURL() !== old", arg=before[0]
        )
        tab.click("#keypoints button:has-text('left hip')")  # the one without truth
        shown(tab, "0/1/3")
        assert "not annotated here" in tab.inner_text("#reading")
        clean(watch)


def test_every_picture_opens_what_it_shows(chromium, page):
    """The clip that starts with it; else the picture, large, and from there the person's clip."""
    tiles = [*report().worst, *report().best]
    with browser.open_page(chromium, page, viewport={"width": 390, "height": 844}) as (tab, watch):
        shown(tab, "0/1/0")
        buttons = tab.locator(".tile button")
        assert buttons.count() == len(tiles) == 3
        buttons.nth(0).click()
        shown(tab, "1/1/0")
        assert not tab.is_visible("#large")
        buttons.nth(1).click()
        assert tab.get_attribute("#large-picture", "src") == tiles[1].picture
        assert tab.inner_text("#large-heading") == "2.0"
        assert not tab.is_visible("#large-clip")
        tab.keyboard.press("Escape")
        assert not tab.is_visible("#large")
        buttons.nth(2).click()
        assert tab.get_attribute("#large-picture", "src") == tiles[2].large
        assert tab.locator("#large").bounding_box()["width"] <= 390
        assert tab.inner_text("#large-clip") == "What was read in frame 1"
        tab.click("#large-clip")
        assert not tab.is_visible("#large")
        shown(tab, "0/1/0")
        clean(watch)


def test_one_source_is_shown_at_a_time(chromium, tmp_path):
    path = tmp_path / "report.html"
    without = Report("Prediction", "b", "", absent={"tokens": "no <tokens>"}, facts=[("f", "of b")])
    both = Report("Predictions", "t", "l", sources=[report(), without], sources_are="Video")
    path.write_text(render(both), encoding="utf-8")
    with browser.open_page(chromium, path, viewport={"width": 1280, "height": 900}) as (tab, watch):
        shown(tab, "0/1/0")
        assert tab.locator(".chart polyline").count() >= 2
        tab.select_option("#source", "1")
        assert not tab.is_visible("#explorer")
        assert "no <tokens>" in tab.inner_text("#tokens")
        assert "of b" in tab.inner_text("#facts")
        assert "a/very/long" not in tab.inner_text("#facts")
        assert not tab.locator(".tile").first.is_visible()
        tab.select_option("#source", "0")
        assert tab.is_visible("#explorer")
        assert tab.locator("#clip option").count() == 2
        clean(watch)


def test_words_in_the_heads_of_tables_stay_whole(chromium, tmp_path):
    path = tmp_path / "report.html"
    columns = [f"val_boxes_{i}.json (evaluations/step-0000012{i})" for i in range(4)]
    table = Table("By joint", columns, [("left shoulder", [1.0] * 4)])
    path.write_text(render(replace(report(), tables=[table])), encoding="utf-8")
    with browser.open_page(chromium, path, viewport={"width": 390, "height": 844}) as (tab, watch):
        shown(tab, "0/1/0")
        lines = tab.eval_on_selector_all(
            "thead th.number", "all => all.map(e => e.innerText.split('\\n'))"
        )
        assert lines == [c.replace(" (", "\n(").split("\n") for c in columns]
        heights = tab.eval_on_selector_all("thead th", "all => all.map(e => e.offsetHeight)")
        assert max(heights) < 80  # two lines
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        clean(watch)


def test_the_heatmap_lies_on_its_keypoint(chromium, page):
    """Painted in the keypoint's colour, and strongest around where the keypoint is."""
    with browser.open_page(chromium, page, viewport={"width": 1280, "height": 900}) as (tab, _):
        shown(tab, "0/1/0")
        for name in ("pose", "truth"):
            tab.click(f"#draw-{name}")
        for joint in (13, 0):
            tab.locator("#keypoints button").nth(joint).click()
            shown(tab, f"0/1/{joint}")
            record = report().clips[0].frames[1].record
            around = tab.evaluate(
                """([x, y]) => {
                  const c = document.querySelector("#panel-heatmap canvas");
                  const s = c.height / 128, g = c.getContext("2d"), found = [];
                  for (let a = 0; a < 6.2; a += 0.4) {
                    const at = [(x + 0.5) * s + 12 * Math.cos(a), (y + 0.5) * s + 12 * Math.sin(a)];
                    found.push([...g.getImageData(...at, 1, 1).data]);
                  }
                  return found.map((p) => p.slice(0, 3));
                }""",
                record["keypoints"][joint],
            )
            color = [int(record["colors"][joint][i : i + 2], 16) for i in (1, 3, 5)]
            assert np.abs(np.mean(around, axis=0) - color).max() < 50


def test_curves_are_read_by_pointer_and_keyboard(chromium, page):
    with browser.open_page(chromium, page, viewport={"width": 1280, "height": 900}) as (tab, watch):
        chart = tab.locator(".chart").first
        assert chart.locator("polyline").count() == 3
        label = chart.locator("svg").get_attribute("aria-label")
        assert "Loss by step: loss from 3 to 0.03333" in label
        chart.locator(".plot").hover()
        assert re.match(r"step \d+: loss [\d.e-]+, pose", chart.locator(".reading").inner_text())
        chart.locator("svg").focus()
        before = chart.locator(".reading").inner_text()
        tab.keyboard.press("ArrowLeft")
        assert chart.locator(".reading").inner_text() != before
        chart.locator(".legend button", has_text="pose").click()
        assert chart.locator("polyline").count() == 2
        clean(watch)


def test_on_a_phone(chromium, page):
    options = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with browser.open_page(chromium, page, **options) as (tab, watch):
        shown(tab, "0/1/0")
        width, inner = tab.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert (width, inner) == (390, 390)
        panels = tab.locator(".panel")
        visible = [panels.nth(i).is_visible() for i in range(3)]
        assert visible == [True, False, False]
        tab.tap("#tab-clusters")
        assert [panels.nth(i).is_visible() for i in range(3)] == [False, False, True]
        tab.keyboard.press("ArrowLeft")
        assert [panels.nth(i).is_visible() for i in range(3)] == [False, True, False]
        assert tab.get_attribute("#tab-causal", "aria-selected") == "true"
        tab.tap("#keypoints button:has-text('nose')")
        shown(tab, "0/1/13")
        for selector in (
            ".chip:visible",
            ".tabs button",
            ".switches label",
        ):  # large enough for fingers
            for box in tab.locator(selector).evaluate_all("a => a.map(e => e.offsetHeight)"):
                assert box >= 32, selector
        sizes = tab.evaluate(
            """[...document.querySelectorAll("p, td, th, dd, span, button")]
              .filter((e) => e.offsetParent).map((e) => parseFloat(getComputedStyle(e).fontSize))"""
        )
        assert min(sizes) >= 14
        clean(watch)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable(chromium, page, scheme):
    size = {"width": 800, "height": 600}
    with browser.open_page(chromium, page, viewport=size, color_scheme=scheme) as (tab, watch):
        shown(tab, "0/1/0")
        screen = picture(tab.screenshot())
        background = screen[2, 2].mean()
        assert background > 240 if scheme == "light" else background < 40
        assert screen.std() > 8, "nothing is written on it"
        contrasts = tab.evaluate(
            """() => {
              const light = (css) => {
                const part = css.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
                  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
                return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
              };
              const paper = light(getComputedStyle(document.body).backgroundColor);
              return [".lead", "p", "a", "dt", "td", ".tile span", ".reading"].map((name) => {
                const ink = light(getComputedStyle(document.querySelector(name)).color);
                return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
              });
            }"""
        )
        assert min(contrasts) >= 4.5
        clean(watch)


@pytest.mark.parametrize(
    ("fine", "caption"),
    [("causal_only", "discards the other 33 tokens"), ("off", "model.fine=off")],
)
def test_models_without_clusters_or_tokens(chromium, tmp_path, fine, caption):
    path = tmp_path / "report.html"
    path.write_text(render(report(fine)), encoding="utf-8")
    with browser.open_page(chromium, path, viewport={"width": 1280, "height": 900}) as (tab, watch):
        shown(tab, "0/1/0")
        assert caption in tab.inner_text("#panel-clusters figcaption")
        tab.click("#keypoints button:has-text('nose')")
        shown(tab, "0/1/13")
        assert tab.is_visible("#panel-causal canvas") == (fine == "causal_only")
        clean(watch)


def test_a_script_that_is_not_the_pages_own_does_not_run(chromium, page, tmp_path):
    """The policy holds, should a name ever get through; and a planted fault is seen."""
    path = tmp_path / "planted.html"
    text = page.read_text(encoding="utf-8")
    planted = "<script>document.title = 'owned'</script><img src='https://example.invalid/a.png'>"
    path.write_text(text.replace("<main", planted + "<main"), encoding="utf-8")
    with browser.open_page(chromium, path) as (tab, watch):
        shown(tab, "0/1/0")
        assert tab.title() != "owned"
        assert len(watch.messages) == 2, "the browser tells what it refused"
        assert all("Content Security Policy" in line for line in watch.messages)


# -- without a browser -----------------------------------------------------------------------------


def test_without_a_browser(monkeypatch):
    monkeypatch.setenv("CMPOSE_BROWSER", "no-such-browser")
    monkeypatch.delenv("CMPOSE_REQUIRE_BROWSER", raising=False)
    with pytest.raises(pytest.skip.Exception, match="there is no browser no-such-browser: install"):
        browser.require_browser()
    monkeypatch.setenv("CMPOSE_REQUIRE_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception, match="CMPOSE_REQUIRE_BROWSER=1, but there is no br"):
        browser.require_browser()
