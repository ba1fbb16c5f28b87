"""The pages in a real browser: Chromium, from the system, driven by Playwright."""

from __future__ import annotations

import os
import re
import shutil

import pytest
from tiny_models import some_text

import longmem
from longmem import MemoryBank

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium; Debian's package is `chromium`")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(60_000)
    yield page
    assert errors == []
    page.close()


def ask(page, text):
    """Send a message, and return the answer when all of it has come."""
    before = page.locator(".turn.assistant button").count()
    page.get_by_label("Your message").fill(text)
    page.get_by_role("button", name="Send").click()
    page.locator(".turn.assistant button").nth(before).wait_for()
    return page.locator(".turn.assistant span").last.inner_text()


def test_a_file_is_dropped_asked_about_explained_and_forgotten(page, url, tmp_path):
    (tmp_path / "notes.txt").write_text(some_text(40), encoding="utf-8")
    page.goto(url)
    alone = ask(page, "the cat sat")
    page.get_by_role("button", name="New conversation").click()
    page.get_by_label("Text files to remember").set_input_files(tmp_path / "notes.txt")
    page.get_by_role("button", name="Forget notes.txt").wait_for()
    told = ask(page, "the cat sat")
    assert told != alone
    page.get_by_role("button", name="Why?").last.click()
    frame = page.frame_locator("#trace")
    word = frame.locator("#text span.new").first
    word.click()
    passage = frame.locator(".passage").first
    assert "notes.txt, tokens" in passage.inner_text()
    assert re.search(
        r"rgba?\(", passage.locator("mark").first.evaluate("mark => getComputedStyle(mark).backgroundColor")
    )
    passage.click()
    assert passage.get_attribute("aria-pressed") == "true"
    page.get_by_role("button", name="Forget notes.txt").click()
    page.get_by_role("button", name="Forget notes.txt").wait_for(state="detached")
    page.get_by_role("button", name="New conversation").click()
    assert ask(page, "the cat sat") == alone


@pytest.mark.parametrize("width", [320, 400, 900, 1200])
def test_nothing_of_the_page_stands_out_of_the_window_or_of_its_frame(browser, url, width):
    page = browser.new_page(viewport={"width": width, "height": 700})
    page.goto(url)
    page.get_by_label("Your message").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    outside = """() => [...document.querySelectorAll("body *")].filter(each => {
        const own = each.getBoundingClientRect(), frame = each.parentElement.getBoundingClientRect();
        return own.width && (own.right > frame.right + 1 || own.left < frame.left - 1);
    }).map(each => each.outerHTML.slice(0, 80))"""
    assert page.evaluate(outside) == []
    page.close()


def test_a_trace_is_read_by_keyboard_in_the_dark_and_on_a_telephone(browser, model, tmp_path):
    bank = MemoryBank.for_model(model)
    model.memorize(bank, some_text(40), "<b>notes</b>")
    trace = longmem.explain(model, "the dog <i>saw", memory=bank, max_new_tokens=6)
    trace.to_html(tmp_path / "trace.html")
    for width, scheme, background in ((1200, "light", "rgb(253, 253, 252)"), (400, "dark", "rgb(22, 24, 27)")):
        page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 700})
        page.goto((tmp_path / "trace.html").as_uri())
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == background
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.locator("#text").inner_text() == "".join(trace.words)
        first = page.locator("#text span.new").first
        first.focus()
        page.keyboard.press("ArrowRight")
        token = int(page.locator("#text span.chosen").get_attribute("data-token"))
        assert token == trace.num_prompt_tokens + 1
        reads = trace.passages([token])
        card = page.locator(".passage").first
        assert card.locator("b").inner_text().endswith(f"<b>notes</b>, tokens {reads[0].start} to {reads[0].stop}")
        assert reads[0].text.strip() in card.inner_text()
        card.focus()
        page.keyboard.press("Enter")
        painted = page.locator("#text span").evaluate_all(
            "words => words.map(word => word.style.backgroundColor !== '').reduce((sum, each) => sum + each, 0)"
        )
        assert painted > 0
        page.keyboard.press("Escape")
        assert page.locator("#text span.chosen").count() == 0
        page.get_by_role("button", name="memory on").click()
        assert page.locator("#without").inner_text() == (trace.answer_without_memory or "(nothing)").strip()
        page.close()


def test_ten_thousand_words_stay_fluid(browser, model, tmp_path):
    """A word is chosen, and all is painted, in less than half a second on a slow machine."""
    bank = MemoryBank.for_model(model)
    model.memorize(bank, some_text(40), "notes")
    small = longmem.explain(model, some_text(20), memory=bank, max_new_tokens=0).to_dict()
    times = 10_000 // len(small["tokens"]) + 1
    large = small | {name: small[name] * times for name in ("tokens", "reads", "chunks")}
    from longmem.tracing.page import trace_page

    (tmp_path / "large.html").write_text(trace_page(large, "large"), encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "large.html").as_uri())
    assert page.locator("#text span").count() >= 10_000
    took = page.evaluate(
        "() => { const began = performance.now(); choose(9000); document.body.offsetHeight; return performance.now() - began; }"
    )
    assert took < 500 * 6, took
    page.close()
