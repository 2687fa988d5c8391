"""The page on this machine: 127.0.0.1 only, nothing loaded from or sent to anywhere else."""

from __future__ import annotations

import warnings
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..errors import SparsifinerError
from .html import read_asset

ADDRESS = "127.0.0.1"
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'self'"
)
"""What a browser may load for the page: its own server's files."""
_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_CODE_FONTS = ("ui-monospace", "Consolas", "monospace")
_LARGEST_UPLOAD = "200mb"


class _OwnServerOnly:
    """Middleware that sends :data:`POLICY` with every answer.

    Args:
        app: an ASGI application.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def serve(page: gr.Blocks, port: int | None = None, *, browser: bool = False) -> str:
    """Start to serve ``page`` in threads of this process, and return its address.

    ``page.close()`` ends it.

    Args:
        page: of :func:`~sparsifiner.explorer.page.build_page`.
        port: to listen on; the first free one from 7860 on if None.
        browser: open the page in the user's browser.

    Raises:
        ValueError: if the port is taken.
    """
    theme = gr.themes.Base(
        primary_hue="cyan", neutral_hue="gray", text_size="sm", spacing_size="sm", radius_size="sm",
        font=[gr.themes.Font(name) for name in _FONTS], font_mono=[gr.themes.Font(name) for name in _CODE_FONTS],
    )  # fmt: skip
    # A page elsewhere whose name is made to point here is refused, so that it cannot read what this one shows.
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=[ADDRESS, "localhost"]), Middleware(_OwnServerOnly)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, url, _ = page.queue(api_open=False).launch(
                server_name=ADDRESS, server_port=port, share=False, inbrowser=browser, prevent_thread_lock=True,
                quiet=True, show_error=True, footer_links=[], ssr_mode=False, pwa=False, mcp_server=False,
                max_file_size=_LARGEST_UPLOAD, theme=theme, css=read_asset("page.css"),
                app_kwargs={"middleware": middleware, "docs_url": None, "redoc_url": None},
            )  # fmt: skip
    except OSError as error:
        where = "7860 to 7959 are" if port is None else f"{port} is"
        raise SparsifinerError(f"no page can be served: port {where} taken; name another with --port") from error
    return url
