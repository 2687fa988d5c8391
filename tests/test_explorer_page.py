"""The explorer's page, as a client and as a browser see it."""

from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
from conftest import lively
from PIL import Image

import sparsifiner
from sparsifiner import SparsifinerConfig

pytestmark = [
    pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio: pip install 'sparsifiner[explorer]'"),
    pytest.mark.filterwarnings("ignore"),  # of the clients
]
MEAN = "mean of the heads"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(autouse=True)
def _loose_ends() -> Iterator[None]:
    """Clients leave sockets and event loops open, which is no other test's matter."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    """The page of a model on 8x8 patches, in a process of its own, with the bundled photographs."""
    folder = tmp_path_factory.mktemp("explorer") / "a <tiny> model"
    sizes: dict[str, Any] = dict(img_size=32, patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=7)
    dense = lively(timm.create_model("vit_tiny_patch16_224", **sizes))
    sparsifiner.save_pretrained(sparsifiner.sparsify(dense, SparsifinerConfig(keep_rate=0.3)), folder)
    command = [sys.executable, "-m", "sparsifiner", "explore", "--model", str(folder)]
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder.parent / "uploads")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.match(r"http://127\.0\.0\.1:\d+/", line)
        assert found is not None, line
        try:
            yield found[0]
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(30) == 0
    assert not list((folder.parent / "uploads").rglob("*.png"))  # what was dropped is gone


@pytest.fixture
def unreadable(tmp_path) -> Path:
    file = tmp_path / "notes.jpg"
    file.write_text("no picture")
    return file


@pytest.fixture
def picture(tmp_path) -> Path:
    file = tmp_path / "mine.png"
    Image.linear_gradient("L").convert("RGB").resize((80, 60)).save(file)
    return file


def run_command(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", f"import sys; {script}", *arguments], capture_output=True, text=True)


def pictures(html: str) -> list[str]:
    return re.findall(r'src="(data:image/jpeg[^"]*)"', html)


def test_clients_have_a_state_each(url, picture, unreadable):
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    one, other = Client(url, verbose=False), Client(url, verbose=False)
    for client in (one, other):
        client.predict(handle_file(picture), api_name="/open")
        client.predict(0.3, api_name="/see")
    before = one.predict(1, MEAN, api_name="/draw")
    assert other.predict(1, MEAN, api_name="/draw") == before
    assert len(pictures(before)) == 5
    other.predict(0.9, api_name="/see")
    changed = other.predict(2, "head 2", api_name="/draw")
    assert pictures(changed)[1] != pictures(before)[1]
    with pytest.raises(AppError, match=r"the picture notes\.jpg cannot be read: not an image"):
        other.predict(handle_file(unreadable), api_name="/open")
    assert other.predict(2, "head 2", api_name="/draw") == changed
    assert one.predict(1, MEAN, api_name="/draw") == before
    figures = one.predict(api_name="/measure")
    assert "median of 3 runs" in (figures if isinstance(figures, str) else str(figures))


def test_only_this_machine_is_served_and_nothing_else_is_loaded(url):
    with urllib.request.urlopen(url) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "fonts.googleapis.com" not in answer.read().decode()
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(url, headers={"Host": "elsewhere.example"}))
    port = int(url.rstrip("/").rpartition(":")[2])
    own = next((row[4][0] for row in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)), "127.0.0.1")
    if not own.startswith("127."):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((own, port), timeout=2)


def test_a_port_that_is_taken_is_named(url):
    port = url.rstrip("/").rpartition(":")[2]
    done = run_command("from sparsifiner.cli import main; main(['explore', '--port', sys.argv[1]])", port)
    assert done.returncode == 2
    assert re.fullmatch(f"error: port {port} of 127.0.0.1 cannot be used: .*; name another\n", done.stderr)


def test_without_gradio_the_command_says_what_to_install():
    done = run_command("sys.modules['gradio'] = None; from sparsifiner.cli import main; main(['explore'])")
    assert done.returncode == 2
    assert done.stderr == "error: the explorer needs gradio; pip install 'sparsifiner[explorer]'\n"


@pytest.fixture
def context() -> Iterator[Any]:
    """A dark browser of 1280x720 pixels, and every request that it makes."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1280, "height": 720}, color_scheme="dark")
        context.set_default_timeout(60_000)
        yield context
        browser.close()


def open_tab(context: Any, url: str) -> Any:
    tab = context.new_page()
    tab.goto(url)
    tab.wait_for_selector("#viewer .panels img")
    return tab


def shown(tab: Any) -> list[str]:
    return tab.eval_on_selector_all("#viewer .picture img", "images => images.map(image => image.src)")


def wait_for_caption(tab: Any, text: str) -> None:
    tab.wait_for_function(
        "text => document.querySelector('[data-panel=photo] figcaption')?.innerText.startsWith(text)", arg=text
    )


def test_browser(url, context, picture, unreadable):
    requests: list[str] = []
    context.on("request", lambda request: requests.append(request.url))
    tab = open_tab(context, url)
    tab.wait_for_function("document.querySelector('#figures')?.innerText.includes('median of 3 runs')")
    assert tab.evaluate("document.documentElement.scrollHeight <= 720 && document.documentElement.scrollWidth <= 1280")
    assert tab.evaluate("document.body.classList.contains('dark')")
    assert tab.locator("text=a <tiny> model").count() == 1

    before = shown(tab)
    assert len(before) == 5
    box = tab.locator("[data-panel=photo] .picture").bounding_box()
    tab.mouse.click(box["x"] + box["width"] * 6.5 / 8, box["y"] + box["height"] * 1.5 / 8)
    wait_for_caption(tab, "row 2, column 7")
    clicked = shown(tab)
    assert clicked[1] != before[1]  # another tile keeps other keys
    assert clicked[0] == before[0]
    assert clicked[4] == before[4]

    tab.locator("#viewer").focus()
    tab.keyboard.press("ArrowDown")
    wait_for_caption(tab, "row 3, column 7")
    tab.keyboard.press("Shift+ArrowLeft")
    wait_for_caption(tab, "row 3, column 3")

    other = open_tab(context, url)
    wait_for_caption(other, "row 5, column 6")
    other.locator("#gallery button").nth(1).click()
    other.wait_for_function("source => document.querySelector('#viewer img').src != source", arg=before[0])
    other.locator("#keep input[type=number]").fill("0.9")
    other.keyboard.press("Enter")
    other.wait_for_function("document.querySelector('[data-panel=kept] figcaption').innerText.startsWith('9')")
    kept_by_other = shown(other)

    tab.locator("#layer input[type=range]").focus()
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function("document.querySelector('[data-layer=\"1\"].chosen')")
    wait_for_caption(tab, "row 3, column 3")
    assert shown(tab)[0] == before[0]
    assert shown(tab)[4] == before[4]  # the other tab's rate has not come here
    assert shown(other) == kept_by_other

    tab.locator("[data-layer='0'][data-head='2']").click()
    tab.wait_for_function("document.querySelectorAll('.chosen').length == 1")
    assert tab.locator(".chosen").get_attribute("data-head") == "2"

    now = shown(tab)
    tab.locator("input[type=file]").set_input_files(unreadable)
    tab.locator("text=the picture notes.jpg cannot be read: not an image").wait_for()
    assert "Traceback" not in tab.content()
    assert shown(tab) == now
    tab.locator("input[type=file]").set_input_files(picture)
    tab.wait_for_function("source => document.querySelector('#viewer img').src != source", arg=now[0])
    tab.wait_for_function("document.querySelector('#figures').innerText.includes('mine.png')")
    own = f"{url.rstrip('/')}/"
    assert [request for request in requests if not request.startswith((own, "data:", "blob:"))] == []
