"""What a person sees at the server's page; run by tests.serving.page under an interpreter that has playwright:

page_in_browser.py WHAT URL BROWSER FOLDER      WHAT: chat, reasoning, plain, key, busy
"""

import json
import re
import sys
import threading
import urllib.error
import urllib.request

from playwright.sync_api import Page, expect, sync_playwright

# Keeps how long the answer was, each time that it grew.
WATCH = """() => { window.lengths = []; new MutationObserver(() => {
  const all = document.querySelectorAll("article.assistant .text");
  if (all.length) window.lengths.push(all[all.length - 1].textContent.length);
}).observe(document.getElementById("log"), {childList: true, subtree: true, characterData: true}); }"""

# Stops the next answer in the moment in which its first text is there.
STOP = """(how) => { const shown = document.querySelectorAll("article.assistant").length; new MutationObserver((_, own) => {
  const all = document.querySelectorAll("article.assistant .text");
  if (all.length <= shown || !all[shown].textContent) return;
  own.disconnect();
  if (how == "button") document.getElementById("stop").click();
  else document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape", bubbles: true}));
}).observe(document.getElementById("log"), {childList: true, subtree: true}); }"""


def say(page: Page, text: str) -> None:
    """As with a keyboard alone: the page has put the cursor where one writes."""
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def greedy(page: Page) -> None:
    page.locator("#settings summary").click()
    page.locator("#temperature").fill("0")
    page.locator("#settings summary").click()
    page.locator("#text").focus()


def answered(page: Page, answers: int = 1) -> str:
    expect(page.locator("article.assistant .figures").nth(answers - 1)).to_contain_text(
        "tokens/s", timeout=60_000
    )
    expect(page.locator("#send")).to_be_visible(timeout=60_000)
    return page.locator("article.assistant .text").nth(answers - 1).text_content() or ""


def chat(page: Page, url: str, folder: str) -> None:
    """A message streams, Stop and Escape stop, a new chat is empty, dark is dark, and nothing comes from elsewhere."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    expect(page.locator("#model")).to_have_text("tiny")
    page.evaluate(WATCH)
    greedy(page)  # that it goes on is then no chance
    say(page, "what is the wind?")
    text = answered(page)
    lengths = page.evaluate("window.lengths")
    assert text and len(set(lengths)) >= 5 and lengths == sorted(lengths), lengths
    figures = page.locator("article.assistant .figures").first.text_content() or ""
    assert re.search(r"first token after \d+\.\d\d s · [\d.]+ tokens/s · \d+ tokens", figures), figures
    page.screenshot(path=f"{folder}/chat-light.png")
    for how, count in (("button", 2), ("key", 3)):
        page.locator("#max_tokens").evaluate("field => field.value = 2000")  # as many as there is room for
        page.evaluate(STOP, how)
        say(page, "go on")
        expect(page.locator("article.assistant .figures").nth(count - 1)).to_contain_text("stopped")
        before = page.locator("article.assistant .text").nth(count - 1).text_content()
        page.wait_for_timeout(500)
        assert page.locator("article.assistant .text").nth(count - 1).text_content() == before
        page.wait_for_function(
            "async () => !/^vllm:num_requests_running\\S* [1-9]/m.test(await (await fetch('/metrics')).text())"
        )
    page.emulate_media(color_scheme="dark")
    page.locator("#settings summary").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
    page.screenshot(path=f"{folder}/chat-dark.png")
    page.locator("#fresh").click()
    expect(page.locator("article")).to_have_count(0)
    say(page, "what is the wind?")
    answered(page)
    sent = json.loads(page.evaluate("JSON.stringify(turns.slice(0, 1))"))
    assert sent == [{"role": "user", "content": "what is the wind?"}], sent
    assert all(address.startswith((url, "data:")) for address in asked), asked


def reasoning(page: Page, url: str, folder: str) -> None:
    """Reasoning is folded, and can be read."""
    page.goto(url)
    expect(page.locator("#model")).to_have_text("tiny")
    say(page, "what is the wind?")
    answered(page)
    fold = page.locator("details.reasoning")
    assert fold.get_attribute("open") is None
    fold.locator("summary").click()
    assert len(fold.text_content() or "") > len("Reasoning")
    page.screenshot(path=f"{folder}/reasoning.png")


def plain(page: Page, url: str, folder: str) -> None:
    """Without a chat template it continues the text."""
    page.goto(url)
    expect(page.locator("#hint")).to_contain_text("no chat template")
    greedy(page)
    say(page, "the keys and the values")
    text = answered(page)
    body = {"model": "tiny", "prompt": "the keys and the values", "max_tokens": 512, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    want = json.loads(urllib.request.urlopen(request).read())["choices"][0]["text"]
    assert text == want, (text, want)
    page.screenshot(path=f"{folder}/plain.png")


def key(page: Page, url: str, folder: str) -> None:
    """The page says that a key is missing, and goes on with it."""
    page.goto(url)
    expect(page.locator(".error")).to_contain_text("API key")
    page.locator("#settings summary").click()
    page.locator("#key").fill("secret")
    page.locator(".error button").click()
    expect(page.locator("#model")).to_have_text("tiny")
    expect(page.locator(".error")).to_have_count(0)
    page.locator("#text").focus()
    say(page, "what is the wind?")
    answered(page)


def busy(page: Page, url: str, folder: str) -> None:
    """One line says that the queue is full; "Try again" brings the answer once it is not."""
    page.goto(url)
    expect(page.locator("#model")).to_have_text("tiny")
    body = {"model": "tiny", "prompt": "the keys", "max_tokens": 2000, "ignore_eos": True, "n": 1}
    others = [threading.Thread(target=ask, args=(url, body)) for _ in range(24)]
    for other in others:
        other.start()
    page.wait_for_timeout(300)
    say(page, "what is the wind?")
    expect(page.locator(".error")).to_contain_text(re.compile(r"busy: its queue is full. Try again in \d+ s"))
    page.screenshot(path=f"{folder}/busy.png")
    for other in others:
        other.join()
    page.keyboard.press("Enter")  # the button has the focus
    answered(page)
    expect(page.locator(".error")).to_have_count(0)
    assert page.locator("article.user").count() == 1


def ask(url: str, body: dict) -> None:
    """Asks until it is answered."""
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(1000):
        try:
            urllib.request.urlopen(request).read()
            return
        except urllib.error.HTTPError as error:
            assert error.code == 429


def main(what: str, url: str, browser: str, folder: str) -> None:
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=quiet)
        page = chromium.new_page(viewport={"width": 900, "height": 700})
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        {"chat": chat, "reasoning": reasoning, "plain": plain, "key": key, "busy": busy}[what](
            page, url, folder
        )
        chromium.close()
    assert not wrong, wrong


if __name__ == "__main__":
    main(*sys.argv[1:])
