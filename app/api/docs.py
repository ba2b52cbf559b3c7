"""`/docs`, with everything that it shows served from here: a trading floor's network reaches no public hosts."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import partial
from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

PAGE = "/docs"
SCRIPT, STYLE, ICON = "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css", "/docs/favicon.png"
PATHS = frozenset({PAGE, SCRIPT, STYLE, ICON, "/openapi.json"})


def add_docs(app: FastAPI) -> None:
    """Serve the page of the OpenAPI document and the three files that it loads."""
    folder = files("fastapi_offline") / "static"
    page = _page(app.title)
    app.router.routes.append(Route(PAGE, lambda _: page))
    for path in (SCRIPT, STYLE, ICON):
        app.router.routes.append(Route(path, partial(_file, str(folder / path.rpartition("/")[2]))))


def _page(title: str) -> HTMLResponse:
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title=title,
        swagger_js_url=SCRIPT,
        swagger_css_url=STYLE,
        swagger_favicon_url=ICON,
    )
    page.headers["Content-Security-Policy"] = _policy(bytes(page.body).decode())
    return page


def _policy(html: str) -> str:
    """Content Security Policy of a page: our own files, this very inline script, and no frame around it."""
    inline = (script.encode() for script in re.findall(r"<script>(.*?)</script>", html, re.DOTALL))
    digests = (base64.b64encode(hashlib.sha256(script).digest()).decode() for script in inline)
    scripts = " ".join(["'self'", *(f"'sha256-{digest}'" for digest in digests)])
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _file(file: str, _: Request) -> FileResponse:
    return _WholeFile(file)


class _WholeFile(FileResponse):
    """A file without the ranges that a request may ask for: the framework refuses bad ones in a form of its own."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
        await super().__call__({**scope, "headers": headers}, receive, send)
