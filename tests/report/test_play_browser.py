"""The playground in a real browser: what its user sees, and that nothing leaves the machine."""

from __future__ import annotations

import re
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect
from processes import served_until_interrupted

from abreast.report.answers import open_models
from abreast.report.playground import build_page, check_gradio, serve
from abreast.report.records import read_choices

pytestmark = pytest.mark.slow
DONE = re.compile("Done")
PATIENT = 60_000  # milliseconds; shared machines stall


@pytest.fixture(scope="module")
def models(playable_run):
    return open_models(read_choices(playable_run))


@pytest.fixture(scope="module")
def connections():
    """Addresses outside this machine that this process has tried to reach, ever since."""
    addresses = []

    def watch(event, arguments):
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            if arguments[1][0] not in ("127.0.0.1", "::1", "localhost"):
                addresses.append(arguments[1])
        elif event == "socket.getaddrinfo" and arguments[0] not in (None, "127.0.0.1", "localhost"):
            addresses.append(arguments[0])

    sys.addaudithook(watch)
    return addresses


@pytest.fixture(scope="module")
def address(models, connections):
    check_gradio()
    blocks = build_page(models)
    yield serve(blocks)
    blocks.close(verbose=False)


def faults_of(tab, address):
    """What goes wrong in a page from now on, and what it asks of any other address."""
    faults = []
    own = (address, "data:", "blob:")
    tab.on("console", lambda message: faults.append(message.text) if message.type == "error" else 0)
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on(
        "request",
        lambda request: None if request.url.startswith(own) else faults.append(request.url),
    )
    return faults


@pytest.fixture
def open_page(browser, address):
    """Opens the page; at the end nothing may have gone wrong in it, or come from elsewhere."""
    contexts, faults = [], []

    def opened(**options):
        context = browser.new_context(viewport={"width": 1360, "height": 900}, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(PATIENT)
        faults.append(faults_of(tab, address))
        tab.goto(address)
        expect(tab.locator("#ab-prompt textarea")).to_be_visible(timeout=PATIENT)
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert not any(faults), faults


def ask(tab, prompt="abc abc"):
    tab.fill("#ab-prompt textarea", prompt)
    tab.click("#ab-run")


def done(tab):
    expect(tab.locator("#ab-status")).to_have_text(DONE, timeout=PATIENT)


def axe_faults(tab):
    violations = Axe().run(tab).response["violations"]
    return [
        (fault["id"], node["html"])
        for fault in violations
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]


def test_both_answers_stream_and_part(open_page):
    tab = open_page()
    tab.get_by_role("button", name="Settings").click()
    tab.get_by_label("New tokens, at most").fill("200")
    texts = tab.locator("#ab-original .ab-text"), tab.locator("#ab-conversion .ab-text")
    tab.evaluate(
        """() => {
            window.seen = {};
            const look = () => ["ab-original", "ab-conversion", "ab-status"].forEach(id => {
                const text = document.querySelector(`#${id} .ab-text, #${id} [role]`)?.textContent;
                (window.seen[id] ??= new Set()).add(text);
            });
            new MutationObserver(look).observe(
                document.body, {childList: true, subtree: true, characterData: true});
        }"""
    )
    ask(tab)
    done(tab)
    expect(tab.locator("#ab-verdict")).to_have_text(
        re.compile(r"The answers part at token \d+: the original has '.*', the conversion '.*'")
    )
    seen = tab.evaluate("Object.fromEntries(Object.entries(seen).map(([k, v]) => [k, [...v]]))")
    assert len(seen["ab-original"]) > 3 and len(seen["ab-conversion"]) > 3
    assert "Working …" in seen["ab-status"]
    for name in ("#ab-original", "#ab-conversion"):
        mark = tab.locator(f"{name} mark")
        expect(mark).to_have_count(1)
        expect(mark.locator(".ab-flag")).to_have_text("differs")
        expect(tab.locator(f"{name} .ab-speed")).to_have_text(re.compile(r"\d[\d,.]* tokens/s"))
        expect(tab.locator(f"{name} .ab-figures")).to_contain_text("200 tokens")
    before = """e => {
        const range = document.createRange();
        range.setStart(e, 0);
        range.setEndBefore(e.querySelector("mark"));
        return range.toString();
    }"""
    assert texts[0].evaluate(before) == texts[1].evaluate(before)


def test_slider_changes_the_plan_and_original_agrees_with_itself(open_page):
    tab = open_page()
    expect(tab.locator("#ab-about")).to_contain_text("6 layers in 4 stages")
    expect(tab.locator("#ab-about")).to_contain_text("converted checkpoint")
    before = tab.locator(".ab-ring").get_attribute("cx")
    tab.locator("#ab-depth input[type=range]").focus()
    tab.keyboard.press("ArrowRight")
    expect(tab.locator("#ab-about")).to_contain_text("6 layers in 5 stages", timeout=PATIENT)
    expect(tab.locator("#ab-about")).to_contain_text("grouped in memory")
    assert re.search(r"0\.\d{5} ± 0\.\d{5} nats", tab.inner_text("#ab-about"))
    assert tab.locator(".ab-ring").get_attribute("cx") != before
    ask(tab)
    done(tab)
    expect(tab.locator("#ab-conversion")).to_contain_text("5 of 6 stages, grouped in memory")
    tab.locator("#ab-depth input[type=range]").focus()
    tab.keyboard.press("End")
    expect(tab.locator("#ab-about")).to_contain_text("6 layers in 6 stages", timeout=PATIENT)
    ask(tab)
    expect(tab.locator("#ab-verdict")).to_have_text(
        "Both answers agree in all 64 tokens.", timeout=PATIENT
    )
    expect(tab.locator("mark")).to_have_count(0)


def test_a_conversion_can_be_run_grouped_instead(open_page):
    tab = open_page()
    tab.get_by_label("grouped in memory").check()
    expect(tab.locator("#ab-about")).to_contain_text("shares the original's weights")
    ask(tab)
    done(tab)
    expect(tab.locator("#ab-conversion")).to_contain_text("4 of 6 stages, grouped in memory")


def test_stop_keeps_what_is_there_and_the_next_run_works(open_page):
    tab = open_page()
    tab.get_by_role("button", name="Settings").click()
    tab.get_by_label("New tokens, at most").fill("500")
    ask(tab)
    expect(tab.locator("#ab-verdict")).to_contain_text("token", timeout=PATIENT)
    tab.click("#ab-stop")
    status = expect(tab.locator("#ab-status"))
    status.to_have_text("Stopped.", timeout=PATIENT, use_inner_text=True)
    expect(tab.locator("#ab-original .ab-cursor")).to_be_hidden()
    answer = tab.inner_text("#ab-original .ab-text")
    tab.wait_for_timeout(1000)
    assert tab.inner_text("#ab-status") == "Stopped."
    assert tab.inner_text("#ab-original .ab-text") == answer
    tab.get_by_label("New tokens, at most").fill("8")
    ask(tab)
    done(tab)
    expect(tab.locator("#ab-original .ab-figures")).to_contain_text("8 tokens")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ("a" * 600, "the prompt has 600 tokens, the model holds 512 with the answer; shorten it"),
    ],
)
def test_prompts_that_cannot_be_run_give_a_message(open_page, prompt, message):
    tab = open_page()
    ask(tab, prompt)
    expect(tab.locator("#ab-status .ab-error")).to_contain_text(message, timeout=PATIENT)


def test_a_long_prompt_says_that_the_answer_was_cut(open_page):
    tab = open_page()
    ask(tab, "a" * 500)
    expect(tab.locator("#ab-status")).to_have_text(
        "Done. The model holds 512 tokens, so the answer was cut there.", timeout=PATIENT
    )


def test_users_wait_for_each_other(open_page):
    tabs = [open_page(), open_page()]
    for tab in tabs:
        ask(tab)
    for tab in tabs:
        done(tab)
    assert len({tab.inner_text("#ab-original .ab-text") for tab in tabs}) == 1


def test_names_with_html_are_text(open_page, models):
    tab = open_page()
    assert "<b>" in models.run.model and "${1+1}" in models.run.model
    expect(tab.locator("#ab-heading code")).to_have_text(models.run.model)
    assert tab.locator("#ab-heading b").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1360, 390])
def test_no_serious_accessibility_fault(open_page, scheme, width):
    tab = open_page(color_scheme=scheme)
    tab.set_viewport_size({"width": width, "height": 844})
    tab.get_by_role("button", name="Settings").click()
    assert axe_faults(tab) == []
    ask(tab)
    done(tab)
    expect(tab.locator("mark")).to_have_count(2)
    assert axe_faults(tab) == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator("h1").count() == 1


def test_only_this_machine_is_served(address):
    request = urllib.request.Request(address, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    with urllib.request.urlopen(address) as answer:
        assert answer.status == 200


def test_nothing_was_sent_elsewhere(address, connections):
    assert connections == []
    with socket.socket(type=socket.SOCK_DGRAM) as other:
        other.connect(("192.0.2.1", 9))  # which sends nothing
    assert connections == [("192.0.2.1", 9)]
    connections.clear()


def test_faults_would_be_seen(browser, address):
    tab = browser.new_page()
    faults = faults_of(tab, address)
    tab.goto(address)
    tab.evaluate("fetch('http://127.0.0.2:9/').catch(() => console.error('x'))")
    # the page's own policy stops it before it is a request
    assert "http://127.0.0.2:9/" in faults[0] and "Content Security Policy" in faults[0]
    assert faults[-1] == "x"
    tab.close()


def test_command_serves_until_it_is_interrupted(playable_run, tmp_path):
    status, said = served_until_interrupted(str(playable_run))
    assert status == 0 and "closed" in said
    assert list(Path(tmp_path).iterdir()) == []
