"""`/docs`, with everything that it shows served from here: a trading floor's network reaches no public hosts."""

from __future__ import annotations

from functools import partial
from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse
from starlette.routing import Route

PAGE = "/docs"
SCRIPT, STYLE, ICON = "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css", "/docs/favicon.png"
PATHS = frozenset({PAGE, SCRIPT, STYLE, ICON, "/openapi.json"})


def add_docs(app: FastAPI) -> None:
    """Serve the page of the OpenAPI document and the three files that it loads."""
    folder = files("fastapi_offline") / "static"
    app.router.routes.append(Route(PAGE, lambda _: _page(app.title)))
    for path in (SCRIPT, STYLE, ICON):
        app.router.routes.append(Route(path, partial(_file, str(folder / path.rpartition("/")[2]))))


def _page(title: str) -> HTMLResponse:
    return get_swagger_ui_html(
        openapi_url="/openapi.json",
        title=title,
        swagger_js_url=SCRIPT,
        swagger_css_url=STYLE,
        swagger_favicon_url=ICON,
    )


def _file(file: str, _: Request) -> FileResponse:
    return FileResponse(file)
