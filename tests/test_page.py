"""The gateway's page, in a real browser, as its users have it: by keyboard, mouse and file."""

from __future__ import annotations

import ast
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from conftest import GatewayProcess

pytest.importorskip("playwright", reason="Playwright for Python is not installed")

from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
PAGE = Path(__file__).parents[1] / "client" / "tritonrank" / "gateway" / "index.html"
QUERY = "something to drink"
#: What breaks a quotation in one language or another, or the page itself.
HOSTILE = [
    "it's \"quoted\" '' \\' \\\\ \\n $HOME `id` $(id) !! %s %d",
    "</script><script>document.title='broken'</script><img src=x onerror=alert(1)>",
    "two\nlines\r\nand a\ttab, \x00 and \x7f, \u2028 and \u2029",
    "서울에서 마시는 녹차",
    "京都の冷たい麦茶 🍵",
    "{{braces}} {query!r} @file ~ #",
]
CALL = "**/v1/rerank"

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}")


@pytest.fixture(scope="session")
def gateway_url(gateway: GatewayProcess) -> str:
    return gateway.url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser, gateway_url: str) -> Iterator[Page]:
    """The page, which must have run without an error, and have asked nobody but the gateway."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.add_init_script(
        "window.violations = [];"
        "addEventListener('securitypolicyviolation', (e) => violations.push(e.violatedDirective));"
    )
    errors: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(gateway_url)
    yield page
    assert page.evaluate("violations") == []
    # Chromium writes a line about each answer that is not 200, and each that does not come.
    assert [each for each in errors if not each.startswith("Failed to load resource")] == []
    assert {url for url in asked if not url.startswith((gateway_url + "/", "data:"))} == set()
    context.close()


def fill(page: Page, query: str, documents: list[str]) -> None:
    page.get_by_label("Query").fill(query)
    page.get_by_label("Documents").fill("\n".join(documents))


def sample_of(page: Page) -> list[str]:
    """The documents that the page begins with."""
    return page.get_by_label("Documents").input_value().splitlines()


def rank(page: Page) -> None:
    page.get_by_role("button", name="Rank", exact=True).click()
    expect(page.get_by_role("status")).to_contain_text("Ranked in")


def shown(page: Page) -> list[str]:
    return page.locator("#list .text").all_text_contents()


def drop(page: Page, name: str, content: str | bytes) -> None:
    content = content.encode() if isinstance(content, str) else content
    transfer = page.evaluate_handle(
        """([name, content]) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(content), (each) => each.charCodeAt());
            transfer.items.add(new File([bytes], name));
            return transfer;
        }""",
        [name, base64.b64encode(content).decode()],
    )
    page.dispatch_event("#form", "dragover", {"dataTransfer": transfer})
    page.dispatch_event("#form", "drop", {"dataTransfer": transfer})


def lines(*values: Any) -> str:
    return "\n".join(json.dumps(each, ensure_ascii=False) for each in values)


def sent(page: Page) -> dict[str, Any]:
    """What the page sends when it ranks."""
    with page.expect_request(CALL) as request:
        page.get_by_role("button", name="Rank", exact=True).click()
    return request.value.post_data_json


def copied(page: Page, language: str) -> str:
    page.get_by_role("radio", name=language).check()
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    return page.evaluate("navigator.clipboard.readText()")


def answer(route: Route, scores: list[float], status: int = 200) -> None:
    best = sorted(range(len(scores)), key=lambda i: -scores[i])
    results = [{"index": i, "relevance_score": scores[i]} for i in best]
    route.fulfill(status=status, json={"model": "a", "results": results})


def test_it_ranks_by_keyboard_alone(page: Page) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_label("Query")).to_be_focused()
    page.keyboard.press("Control+A")
    page.keyboard.type(QUERY)
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Documents")).to_be_focused()
    page.keyboard.press("Control+A")
    page.keyboard.type("a red car\n\n   \ncold water from a spring\ngreen tea")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("status")).to_contain_text("Ranked in")
    assert set(shown(page)[:2]) == {"cold water from a spring", "green tea"}
    assert shown(page)[2:] == ["a red car"]  # And blank lines are no documents.


def test_every_control_is_reached_and_has_a_name_and_a_visible_focus(page: Page) -> None:
    rank(page)
    page.locator("body").click(position={"x": 2, "y": 2})
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        focus = page.evaluate(
            """() => {
                const it = document.activeElement;
                const visible = [it, it.parentElement, it.nextElementSibling]
                    .some((each) => each && getComputedStyle(each).outlineStyle !== "none");
                return it === document.body ? null : [it.id || it.value || it.tagName, visible];
            }"""
        )
        if focus is None:
            break
        assert focus[1], focus
        reached.append(focus[0])
    assert reached == [
        "query",
        "open",
        "documents",
        "rank",
        "passages",
        "SUMMARY",
        "copy",
        "curl",
        "code",
    ]
    page.get_by_role("radio", name="curl").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("region", name="Code")).to_contain_text("import httpx")


def test_order_scores_and_movement_are_shown(page: Page) -> None:
    page.route(CALL, lambda route: answer(route, [0.25, 0.5, 0.00004, 1]))
    fill(page, QUERY, ["one", "two", "three", "four"])
    rank(page)
    assert shown(page) == ["four", "two", "one", "three"]
    texts = page.locator("#list .score").all_text_contents()
    assert texts == ["1.0000", "0.5000", "0.2500", "0.0000"]
    assert page.locator(".arrow").all_text_contents() == ["▲3", "=", "▼2", "▼1"]
    words = page.locator(".moved .unseen").all_text_contents()
    assert words == ["up 3 places", "not moved", "down 2 places", "down 1 place"]
    numbers = page.locator(".number").all_text_contents()
    assert numbers == [f"document {n}" for n in (4, 2, 1, 3)]
    bars = page.locator(".bar > span").evaluate_all("all => all.map((each) => each.style.width)")
    assert bars == ["100%", "50%", "25%", "0.004%"]


def test_the_example_ranks(page: Page) -> None:
    rank(page)
    texts = shown(page)
    assert "Green tea" in " ".join(texts[:3])
    assert texts.index("A red car parked in front of the station") > 3
    assert re.fullmatch(r"[\d.,]+ ms", page.locator("#took").text_content() or "")
    assert page.locator("#ranked").text_content() == str(len(texts))
    assert page.locator("#model").text_content()


def test_the_policy_allows_nothing_else(page: Page, gateway_url: str) -> None:
    policy = page.request.get(gateway_url).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert len(PAGE.read_bytes()) < 26_500


def test_what_cannot_be_sent_is_said(page: Page) -> None:
    button, status = page.get_by_role("button", name="Rank", exact=True), page.get_by_role("status")
    for query, documents, reason in (
        ("  ", ["a"], "Type a query."),
        (QUERY, ["", "  "], "Type a document, or open a file."),
        (QUERY, ["a"], "Passages are a number from 1 to 1,024."),
    ):
        page.get_by_label("Passages").fill("1.5" if "Passages" in reason else "1")
        fill(page, query, documents)
        expect(button).to_be_disabled()
        expect(status).to_have_text(reason)
        page.get_by_label("Documents").press("Control+Enter")
        page.get_by_label("Query").press("Enter")
        expect(page.locator("#answer")).to_be_hidden()
    page.get_by_label("Passages").fill("2")
    expect(button).to_be_enabled()


def test_errors_are_shown_in_the_servers_words(page: Page) -> None:
    rank(page)
    said = "DOCUMENTS: 2000 is over the limit of 1024; send fewer <b>at once</b>"
    page.route(CALL, lambda route: route.fulfill(status=400, json={"message": said}))
    sent(page)
    expect(page.get_by_role("alert")).to_have_text(said)
    expect(page.locator("#answer")).to_be_hidden()
    page.route(CALL, lambda route: route.fulfill(status=502, body="<html>Bad Gateway</html>"))
    sent(page)
    expect(page.get_by_role("alert")).to_contain_text("502")
    page.route(CALL, lambda route: route.abort("connectionrefused"))
    sent(page)
    expect(page.get_by_role("alert")).to_contain_text("No answer from http")
    page.unroute(CALL)
    rank(page)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_key_is_asked_for_and_sent(page: Page) -> None:
    def guarded(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer s3cret":
            return answer(route, [1.0])
        return route.fulfill(status=401, json={"message": "This server wants a key."})

    page.route(CALL, guarded)
    fill(page, QUERY, ["tea"])
    sent(page)
    expect(page.get_by_role("alert")).to_have_text("This server wants a key.")
    key = page.get_by_role("textbox", name="API key")
    expect(key).to_be_focused()
    page.keyboard.type("clé")
    expect(page.get_by_role("status")).to_contain_text("no letters beyond ASCII")
    key.fill("s3cret")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("Ranked in")
    for language in "curl", "Python", "Cohere":
        call = copied(page, language)
        assert "API_KEY" in call
        assert "s3cret" not in call
    assert (
        page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    )


def test_a_late_answer_never_replaces_a_newer_one(page: Page) -> None:
    held: list[Route] = []
    page.route(CALL, lambda route: held.append(route))
    fill(page, QUERY, ["the first"])
    with page.expect_event("requestfailed"):
        sent(page)
        fill(page, QUERY, ["the second", "another"])
        sent(page)
    answer(held[1], [0.9, 0.1])
    expect(page.get_by_role("status")).to_contain_text("Ranked in")
    assert shown(page) == ["the second", "another"]
    expect(page.get_by_role("alert")).to_be_hidden()


def test_korean_and_japanese_are_sent_and_shown_as_they_are(page: Page) -> None:
    documents = [
        "서울에서 부산까지 KTX로 두 시간 반이 걸립니다",
        "富士山は日本で一番高い山です",
        "ﬁ é e\u0301 𠮷野家",
    ]
    fill(page, "日本で一番高い山は? 제일 높은 산", documents)
    body = sent(page)
    assert body == {
        "query": "日本で一番高い山は? 제일 높은 산",
        "documents": documents,
        "return_documents": False,
    }
    expect(page.get_by_role("status")).to_contain_text("Ranked in")
    assert set(shown(page)) == set(documents)
    assert "富士山は日本で一番高い山です" in copied(page, "curl")


@pytest.mark.parametrize("key", ["Enter", "Control+Enter"])
def test_enter_ends_a_composition_and_sends_nothing(page: Page, key: str) -> None:
    calls: list[str] = []
    page.on("request", lambda request: calls.append(request.url))
    keyboard = page.context.new_cdp_session(page)
    for label in "Query", "Documents":
        page.get_by_label(label).fill("")
        page.get_by_label(label).focus()
        composed = {"text": "のみもの", "selectionStart": 4, "selectionEnd": 4}
        keyboard.send("Input.imeSetComposition", composed)
        page.keyboard.press(key)
        keyboard.send("Input.insertText", {"text": "飲み物"})
        assert calls == []
        assert "飲み物" in page.get_by_label(label).input_value()
    page.get_by_label("Query").press("Enter")
    expect(page.get_by_role("status")).to_contain_text("Ranked in")


def test_a_dropped_file_takes_the_place_of_the_box(page: Page) -> None:
    drop(
        page,
        "found.jsonl",
        lines(HOSTILE[2], {"text": "b"}, {"content": "c"}) + "\r\n\r\n" + lines({"document": "d"}),
    )
    expect(page.locator("#name")).to_have_text("found.jsonl")
    expect(page.get_by_label("Documents")).to_be_hidden()
    assert sent(page)["documents"] == [HOSTILE[2], "b", "c", "d"]
    page.get_by_role("button", name="Remove").click()
    expect(page.get_by_label("Documents")).to_be_focused()
    assert "A red car parked in front of the station" in sent(page)["documents"]


def test_a_file_of_requests_offers_them(page: Page) -> None:
    content = lines(
        {"query": "first", "documents": ["a", {"text": "b"}]},
        {"query": "두 번째", "documents": ["c"]},
    )
    page.get_by_label("Open a file").set_input_files(
        {"name": "requests.jsonl", "mimeType": "", "buffer": b"\xef\xbb\xbf" + content.encode()}
    )
    body = sent(page)
    assert (body["query"], body["documents"]) == ("first", ["a", "b"])
    page.get_by_label("Request of the file").select_option("두 번째")
    body = sent(page)
    assert (body["query"], body["documents"]) == ("두 번째", ["c"])


def test_a_text_file_is_read_by_lines(page: Page) -> None:
    drop(page, "Found.TXT", '"a"\r\n\n{"text": 1}\nc')
    assert sent(page)["documents"] == ['"a"', '{"text": 1}', "c"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '"a"\n{"text": ', "a.jsonl: line 2 is not JSON."),
        ("a.jsonl", '"a"\n{"title": "b"}', "a.jsonl: line 2 has a document that is neither"),
        ("a.jsonl", '"a"\nnull', "line 2 has a document that is neither"),
        ("a.jsonl", '"a"\n{"query": "b", "documents": ["c"]}', "some lines are requests"),
        ("a.txt", " \n\n", "a.txt: it is empty."),
        ("a.txt", "차".encode("euc-kr"), "a.txt: it is not in UTF-8."),
        ("a.pdf", "%PDF", "a.pdf: only .txt and .jsonl files are read."),
    ],
)
def test_a_file_that_is_not_understood_is_refused(
    page: Page, name: str, content: str | bytes, words: str
) -> None:
    drop(page, name, content)
    expect(page.get_by_role("alert")).to_contain_text(words)
    expect(page.get_by_label("Documents")).to_be_visible()


def test_thousands_of_documents_do_not_freeze_it(page: Page) -> None:
    documents = [f"passage {n} of a long list, with some words to read" for n in range(5000)]
    page.route(CALL, lambda route: answer(route, [n / 5000 for n in range(5000)]))
    page.evaluate(
        """() => {
            window.longest = 0;
            new PerformanceObserver((list) => {
                for (const each of list.getEntries()) longest = Math.max(longest, each.duration);
            }).observe({ type: "longtask" });
        }"""
    )
    drop(page, "many.jsonl", lines(*documents))
    expect(page.locator("#count")).to_have_text("5,000")
    rank(page)
    assert len(shown(page)) == 200
    expect(page.locator(".arrow").first).to_have_text("▲4,999")
    page.get_by_role("button", name="Show 200 of 4,800 more").click()
    assert shown(page) == documents[:-401:-1]
    expect(page.locator("#list > li").nth(200)).to_be_focused()
    call = copied(page, "curl")
    assert call.count("passage ") == 5000
    expect(page.locator("#note")).to_contain_text("Copy takes the whole call.")
    assert page.evaluate("longest") < 1000  # Milliseconds, on a busy machine of two cores.


def test_long_texts_are_cut_and_shown_whole_on_demand(page: Page) -> None:
    text = "tea and water " * 2000 + "the end"
    fill(page, QUERY, [text, "short"])
    rank(page)
    item = page.locator("#list > li").filter(has_text="tea and water")
    expect(page.get_by_role("button", name="Show all")).to_have_count(1)
    item.get_by_role("button").click()
    expect(item).to_contain_text("the end")
    item.get_by_role("button", name="Show less").click()
    expect(item).not_to_contain_text("the end")
    for count in 3, 4:
        drop(page, "lines.jsonl", lines("\n".join(["tea"] * count)))
        expect(page.locator("#preview")).to_have_text(" ".join(["tea"] * count))
        page.keyboard.press("Control+Enter")
        expect(page.get_by_role("status")).to_contain_text("Ranked in")
        expect(page.get_by_role("button", name="Show all")).to_have_count(count - 3)
    drop(page, "wide.jsonl", lines("tea and water " * 10))
    rank(page)
    expect(page.get_by_role("button", name="Show all")).to_have_count(0)
    page.set_viewport_size({"width": 320, "height": 640})
    expect(page.get_by_role("button", name="Show all")).to_have_count(1)


FILLER = "The 🚂 leaves the station at noon, e\u0301t 𠮷野家 is closed. "
ANSWER = "Green tea is what people drink with a meal. "
LONG = FILLER * 60 + ANSWER + FILLER * 40


def test_the_passage_that_counts_is_marked(page: Page) -> None:
    fill(page, QUERY, [LONG, "a red car"])
    page.get_by_label("Passages").fill("8")
    with page.expect_response(CALL) as response:
        page.get_by_label("Passages").press("Enter")
        expect(page.get_by_role("status")).to_contain_text("Ranked in")
    results = response.value.json()["results"]
    [passage] = [each["passage"] for each in results if "passage" in each]
    assert passage["start"] > 0
    assert passage["end"] < len(LONG)
    text = LONG[passage["start"] : passage["end"]]
    assert ANSWER in text
    item = page.locator("#list > li").filter(has=page.locator("mark"))
    expect(item).to_have_count(1)
    assert item.locator(".text").text_content().startswith("… " + text[:500])
    page.set_viewport_size({"width": 375, "height": 640})
    item.get_by_role("button", name="Show all").press("Enter")
    assert item.locator(".text").text_content() == LONG
    assert item.locator("mark").text_content() == text
    expect(item.locator("mark")).to_be_in_viewport()
    item.get_by_role("button", name="Show less").press("Enter")
    assert item.locator(".text").text_content().startswith("… " + text[:500])


@pytest.mark.parametrize("language", ["curl", "Python", "Cohere", "gRPC"])
def test_the_same_call_has_the_passages(page: Page, language: str) -> None:
    assert "max_passages" not in copied(page, language)
    page.get_by_label("Passages").fill("8")
    assert re.search(r"max_passages\"?[=:] ?8", copied(page, language))


def test_a_passage_that_is_short_is_not_all(page: Page) -> None:
    passage = {"start": 0, "end": 5, "truncated": True}
    result = {"index": 0, "relevance_score": 0.5, "passage": passage}
    page.route(CALL, lambda route: route.fulfill(json={"model": "a", "results": [result]}))
    fill(page, QUERY, ["a 🍵 b <b>c</b>"])
    rank(page)
    assert shown(page) == ["a 🍵 b"]
    expect(page.locator(".number")).to_have_text("document 1, read in part")
    page.get_by_role("button", name="Show all").click()
    assert shown(page) == ["a 🍵 b <b>c</b>"]
    expect(page.locator("mark")).to_have_text("a 🍵 b")


def test_hostile_texts_are_only_text(page: Page) -> None:
    drop(page, "hostile.jsonl", lines(*HOSTILE))
    assert sent(page)["documents"] == HOSTILE
    expect(page.get_by_role("status")).to_contain_text("Ranked in")
    assert set(shown(page)) == set(HOSTILE)
    assert page.title() == "tritonrank"
    assert page.locator("img").count() == 0


def run(command: list[str], code: str) -> str:
    """Runs what was copied, as a user would."""
    environment = os.environ | {"no_proxy": "127.0.0.1", "PYTHONIOENCODING": "utf-8"}
    # As a script: a user's terminal has no limit on what is pasted.
    return subprocess.run(
        command, input=code.encode(), capture_output=True, check=True, env=environment, timeout=120
    ).stdout.decode()


@pytest.mark.parametrize("shell", ["sh", "bash", "zsh"])
@pytest.mark.parametrize(
    "documents", [HOSTILE, [*HOSTILE, "passage " * 30_000]], ids=["short", "long"]
)
def test_the_copied_curl_works(page: Page, shell: str, documents: list[str]) -> None:
    if not shutil.which(shell) or not shutil.which("curl"):
        pytest.skip(f"{shell} or curl is not installed")
    drop(page, "hostile.jsonl", lines(*documents))
    page.get_by_label("Query").fill('what\'s "tea" \\ 녹차?')
    with page.expect_response(CALL) as response:
        rank(page)
    call = copied(page, "curl")
    assert json.loads(run([shell], call))["results"] == response.value.json()["results"]


@pytest.mark.parametrize("language", ["Python", "Cohere", "gRPC"])
def test_the_copied_python_has_the_same_strings(page: Page, language: str) -> None:
    drop(page, "hostile.jsonl", lines(*HOSTILE))
    page.get_by_label("Query").fill(HOSTILE[0])
    tree = ast.parse(copied(page, language))
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body[1:3]
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert values == {"query": HOSTILE[0], "documents": HOSTILE}


@pytest.mark.parametrize(("language", "package"), [("Python", "httpx"), ("Cohere", "cohere")])
def test_the_copied_python_works(page: Page, language: str, package: str) -> None:
    pytest.importorskip(package)
    rank(page)
    scores = page.locator("#list .score").all_text_contents()
    printed = run([sys.executable, "-"], copied(page, language)).splitlines()
    assert printed == [f"{score} {text}" for score, text in zip(scores, shown(page))]


def test_it_copies_without_a_clipboard_of_its_own(page: Page) -> None:
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.get_by_role("radio", name="gRPC").check()
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_focused()
    page.get_by_label("Documents").fill("")
    page.get_by_label("Documents").press("Control+V")
    assert page.get_by_label("Documents").input_value().startswith("from tritonrank import")


def test_it_works_behind_a_prefix(page: Page, gateway_url: str) -> None:
    def behind(route: Route) -> None:
        route.fulfill(response=route.fetch(url=gateway_url + "/"))

    page.route(re.compile(r"/search/ranker/\?a=1$"), behind)
    page.goto(f"{gateway_url}/search/ranker/?a=1#b")
    page.route("**/search/ranker/v1/rerank", lambda route: answer(route, [1.0]))
    fill(page, QUERY, ["tea"])
    rank(page)
    assert f"{gateway_url}/search/ranker/v1/rerank " in copied(page, "curl")


@pytest.mark.parametrize("width", [320, 375, 768, 1280, 2560])
def test_nothing_is_wider_than_the_screen(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 640})
    drop(page, f"{'long' * 50}.jsonl", lines(*HOSTILE, "w" * 3000, "飲" * 3000))
    rank(page)
    page.get_by_role("button", name="Show all").first.click()
    page.route(CALL, lambda route: route.fulfill(status=400, json={"message": "m" * 500}))
    assert page.evaluate("document.documentElement.scrollWidth") == width
    sent(page)
    expect(page.get_by_role("alert")).to_be_visible()
    page.get_by_text("API key", exact=True).first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width


#: Each text's contrast with what is behind it, by WCAG's formula, least first.
CONTRASTS = """() => {
    const channels = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = (color) => {
        const [r, g, b] = channels(color).map((each) => each / 255)
            .map((each) => (each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (element) => {
        const color = element ? getComputedStyle(element).backgroundColor : "rgb(0, 0, 0)";
        return channels(color)[3] === 0 ? behind(element.parentElement) : color;
    };
    const written = (node) => node.nodeType === Node.TEXT_NODE && node.data.trim();
    return [...document.querySelectorAll("body *")]
        .filter((each) => each.checkVisibility() && !each.disabled)
        .filter((each) => each.value || [...each.childNodes].some(written))
        .map((each) => {
            const pair = [light(getComputedStyle(each).color), light(behind(each))];
            const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
            return [ratio, each.outerHTML.slice(0, 80)];
        })
        .sort(([a], [b]) => a - b);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_can_be_read(page: Page, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    fill(page, QUERY, [*sample_of(page), LONG])
    rank(page)
    expect(page.locator("mark")).to_have_count(1)
    drop(page, "a.pdf", "")
    page.get_by_text("API key", exact=True).first.click()
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 40
    assert contrasts[0][0] >= 4.5, contrasts[0]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", background)[0]) < 128) == (scheme == "dark")


def test_the_picture_in_the_docs(browser: Browser, gateway_url: str, tmp_path: Path) -> None:
    """``PICTURE=docs/gateway.png pytest tests/test_page.py -k picture`` makes it anew."""
    Image = pytest.importorskip("PIL.Image")
    path = Path(os.environ.get("PICTURE", tmp_path / "gateway.png"))
    page = browser.new_page(viewport={"width": 1280, "height": 880}, device_scale_factor=1.5)
    page.goto(gateway_url)
    rank(page)
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    picture = Image.open(BytesIO(page.screenshot(animations="disabled")))
    page.close()
    picture.quantize(128).save(path, optimize=True)
    assert path.stat().st_size < 200_000
