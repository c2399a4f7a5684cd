"""`/docs`: the documentation as a page to read and try out. Open to everybody.

All of it comes from this server: it works on a machine without a way to the internet.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

PAGE = "/docs"
_ASSETS = {name: f"{PAGE}/{name}" for name in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")}
PATHS = frozenset({PAGE, *_ASSETS.values()})


def install(app: FastAPI) -> None:
    """Add the page, and what it consists of."""
    # Of the package, its copy of Swagger UI is used, and none of its code.
    app.add_route(PAGE, _page, include_in_schema=False)
    app.mount(PAGE, StaticFiles(directory=str(files("fastapi_offline") / "static")))


async def _page(request: Request) -> HTMLResponse:
    root = request.scope.get("root_path", "").rstrip("/")
    script, style, icon = (root + path for path in _ASSETS.values())
    return get_swagger_ui_html(
        openapi_url=f"{root}{request.app.openapi_url}",
        title=request.app.title,
        swagger_js_url=script,
        swagger_css_url=style,
        swagger_favicon_url=icon,
    )
