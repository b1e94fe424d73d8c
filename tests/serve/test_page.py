"""The page in a real browser: type, stream, stop, edit, reload, and answers that mean harm."""

import itertools
import json
import shutil

import pytest
import torch

import llama2
from llama2.model.config import ModelConfig
from llama2.model.transformer import build
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.tokenizer.vocabulary import CHAR_OF_BYTE, CONTROL, LLAMA3_SPLIT, NORMAL, Vocabulary, spell_bytes
from tests.serve.conftest import SPECIALS, serving, until

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium to look at the page with: apt-get install chromium"
)

HARM = [
    "**Bold**", " <img src=x onerror=\"window.harm=1\">", " [click](javascript:window.harm=1)",
    " <script>window.harm=1</script>", " ![a](http://192.0.2.1/leak.png)", "\n\n```python\n", "print('hi')", "\n```\n",
]  # fmt: skip
ENDLESS = [f" word{i}" for i in range(200)]


def parrot(path, pieces: list[str], *, again: bool):
    """Save a Llama that says these pieces after every header, once or for ever: each token decides the next one."""
    own = [spell_bytes(piece.encode()) for piece in pieces]
    names = (*CHAR_OF_BYTE.values(), *own, *SPECIALS)
    types = (NORMAL,) * (len(names) - len(SPECIALS)) + (CONTROL,) * len(SPECIALS)
    ids = {piece: i for i, piece in enumerate(names)}
    tokenizer = Tokenizer(
        Vocabulary("bytes", names, types, split=LLAMA3_SPLIT, bos_id=ids[SPECIALS[0]], eos_id=ids[SPECIALS[1]])
    )
    width = -(-len(names) // 8) * 8
    model = build(ModelConfig(width, 1, 2, len(names), 16, context_length=8192 if again else 1024))
    chain = [ids[spell_bytes(b"\n")], *(ids[piece] for piece in own)]
    chain.append(chain[1] if again else ids["<|eot_id|>"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("wo.weight", "w2.weight")):
                parameter.zero_()
        model.tok_embeddings.weight.copy_(torch.eye(len(names), width))
        model.output.weight.zero_()
        for before, after in itertools.pairwise(chain):
            model.output.weight[after, before] = 9.0
    llama2.save(model, path, tokenizer=tokenizer)
    return path


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    harm, endless = parrot(folder / "harm", HARM, again=False), parrot(folder / "endless", ENDLESS, again=True)
    with serving(models=(f"harm={harm}", f"endless={endless}")) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield running
        running.close()


@pytest.fixture
def page(browser, site):
    """A fresh visitor; the test fails if the page asks anybody else, or if an error reaches the console."""
    context = browser.new_context(locale="en-US")
    page = context.new_page()
    asked, problems = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(site.url + "/")
    page.wait_for_selector("#model option", state="attached")
    yield page
    assert not problems
    assert all(url.startswith((site.url, "data:")) for url in asked), asked
    context.close()


def choose(page, model: str) -> None:
    page.select_option("#model", model)


def say(page, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def answered(page) -> str:
    """Wait until the last answer is there; return its text."""
    page.wait_for_selector("#send:not([hidden])")
    page.wait_for_selector(".message.assistant:last-child .tools button")
    return page.inner_text(".message.assistant:last-child .text")


def written(page, text: str) -> None:
    """Wait until the answer that is being written has come so far."""
    page.locator(".message.assistant .text", has_text=text).wait_for()


def test_an_answer_is_streamed_rendered_and_can_do_no_harm(page):
    choose(page, "harm")
    say(page, "Hello")
    answered(page)
    page.wait_for_selector(".message.assistant .md strong")
    assert page.inner_text(".md strong") == "Bold"
    assert "print('hi')" in page.inner_text(".md pre code.language-python")
    text = page.inner_text(".message.assistant .text")
    assert "<script>window.harm=1</script>" in text and "onerror" in text  # shown, as text
    assert page.evaluate("window.harm") is None
    assert page.locator(".md img, .md script").count() == 0
    assert page.locator(".md a[href^='javascript']").count() == 0
    assert "tokens/s" in page.inner_text(".message.assistant .tools")


def test_stop_leaves_what_was_written_and_the_next_question_is_answered(page, site):
    choose(page, "endless")
    say(page, "Go on")
    written(page, "word20")
    page.click("#stop")
    assert "word20" in answered(page)
    assert "stopped" in page.inner_text(".message.assistant .tools")
    worker = next(each for each in site.models.workers if each.name == "endless")
    until(lambda: worker.engine.stats.n_aborted > 0 and not worker.engine.stats.n_running)  # the server has stopped too
    choose(page, "harm")
    say(page, "And now?")
    assert "Bold" in answered(page)


def test_escape_stops_too(page):
    choose(page, "endless")
    say(page, "Go on")
    written(page, "word3")
    page.keyboard.press("Escape")
    assert "word3" in answered(page)


def test_conversations_stay_after_a_reload_and_can_be_deleted(page):
    choose(page, "harm")
    say(page, "The first question")
    answered(page)
    page.click("#new")
    say(page, "The second question")
    answered(page)
    page.reload()
    page.wait_for_selector(".message.user")
    assert page.inner_text(".message.user .text") == "The second question"
    page.wait_for_selector(".md strong")  # rendered anew, not kept as HTML
    assert "<strong>" not in page.evaluate("localStorage.getItem('llama2.page')")
    assert page.locator("#chats li").count() == 2
    page.click("#chats li:nth-child(2) .open")
    assert page.inner_text(".message.user .text") == "The first question"
    page.click("#chats li:nth-child(2) .drop")
    assert page.locator("#chats li").count() == 1


def test_a_message_can_be_edited_and_an_answer_tried_again(page):
    choose(page, "harm")
    say(page, "One")
    answered(page)
    say(page, "Two")
    answered(page)
    page.click(".message.user:first-child .tools button")
    page.fill(".edit textarea", "Another one")
    page.press(".edit textarea", "Enter")
    answered(page)
    assert page.locator(".message").count() == 2
    assert page.inner_text(".message.user .text") == "Another one"
    with page.expect_request("**/v1/chat/completions") as asked:
        page.click("text=Try again")
    assert [each["content"] for each in json.loads(asked.value.post_data)["messages"]] == ["Another one"]
    answered(page)
    assert page.locator(".message").count() == 2


def test_settings_reach_the_server(page):
    choose(page, "endless")
    page.click("#open-settings")
    page.fill("#system", "Be brief.")
    page.fill("#max_tokens", "5")
    page.fill("#temperature", "0.5")
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "Hello")
    sent = json.loads(asked.value.post_data)
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["max_tokens"], sent["temperature"], sent["model"]) == (5, 0.5, "endless")
    assert len(answered(page).split()) == 5
    assert "cut at the longest length" in page.inner_text(".message.assistant .tools")


def test_a_refusal_is_shown_as_the_server_said_it(page):
    choose(page, "harm")
    say(page, "long " * 2000)
    answered_problem = page.wait_for_selector(".problem").inner_text()
    assert "1024" in answered_problem


def test_chinese_and_a_narrow_screen(browser, site):
    context = browser.new_context(locale="zh-CN", viewport={"width": 380, "height": 700})
    page = context.new_page()
    page.goto(site.url + "/")
    page.wait_for_selector("#model option", state="attached")
    assert page.inner_text("#send") == "发送"
    assert not page.is_visible("#new")
    page.click("#open-side")
    page.wait_for_selector("#new", state="visible")
    page.keyboard.press("Escape")
    page.wait_for_selector("#new", state="hidden")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    context.close()


def test_it_can_be_used_by_keyboard_alone(page):
    choose(page, "harm")
    page.focus("#prompt")
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    answered(page)
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Shift+Tab")  # to the buttons of the answer
    assert page.evaluate("document.activeElement.tagName") == "BUTTON"
    nameless = page.evaluate(
        "[...document.querySelectorAll('button, input, select, textarea')].filter(e =>"
        " !(e.textContent.trim() || e.labels?.length || e.getAttribute('aria-label'))).length"
    )
    assert nameless == 0


def test_a_server_with_keys_asks_for_one(browser, pocket_path):
    with serving(keys=("secret",), models=(f"pocket={pocket_path}",)) as server:
        context = browser.new_context(locale="en-US")
        page = context.new_page()
        page.goto(server.url + "/")
        assert "API key" in page.wait_for_selector(".problem").inner_text()
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        page.wait_for_selector("#model option", state="attached")
        assert page.evaluate("localStorage.getItem('llama2.page')") is None or "secret" not in page.evaluate(
            "localStorage.getItem('llama2.page')"
        )
        context.close()
