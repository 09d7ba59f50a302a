"""The app of the local pages: what is served, and what guards it.

Always holds: only requests to a loopback name and from our own pages are answered, whatever else a browser on this
machine has open; a page can fetch nothing from anywhere else; an error is one line. Called by `glidepath page`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse

from data_pipeline.errors import UserError

STATIC = Path(__file__).with_name("static")
NAMES = {"127.0.0.1", "localhost"}
LARGEST_BODY = 32 * 2**20  # a picture and a mask, as text
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def make_app(pages: Mapping[str, APIRouter]) -> FastAPI:
    """An app of these pages, `judge` and `sample`, with what they ask of the server."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.middleware("http")(_guard)
    app.exception_handler(UserError)(_refused)
    app.exception_handler(RequestValidationError)(_malformed)
    for name, routes in pages.items():
        app.include_router(routes)
        _serve_file(app, f"/{name}", f"{name}.html")
    for path in STATIC.iterdir():
        if path.suffix in (".css", ".js", ".svg"):
            _serve_file(app, f"/static/{path.name}", path.name)
    [first, *others] = pages
    if others:
        _serve_file(app, "/", "index.html")
    else:
        app.get("/")(lambda: RedirectResponse(f"/{first}"))
    return app


def _serve_file(app: FastAPI, url: str, name: str) -> None:
    app.get(url)(lambda: FileResponse(STATIC / name, headers={"Cache-Control": "no-cache"}))


async def _guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
    """Refuses what another site in the same browser may send here: under its own name (DNS rebinding), or to us from
    its own pages."""
    origin = request.headers.get("origin")
    if request.url.hostname not in NAMES or (origin and urlsplit(origin).netloc != request.headers["host"]):
        response: Response = _line(403, "this page is for its own machine: open it at the address it was started with")
    elif request.method == "POST" and not 0 <= _length(request) <= LARGEST_BODY:
        response = _line(413, f"request: expected at most {LARGEST_BODY >> 20} MiB; choose a smaller picture")
    else:
        response = await answer(request)
    response.headers.update(HEADERS)
    return response


def _length(request: Request) -> int:
    """Of the body; -1 where it is not stated."""
    stated = request.headers.get("content-length", "")
    return int(stated) if stated.isascii() and stated.isdigit() else -1


def _line(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": text}, status)


async def _refused(request: Request, error: Exception) -> Response:
    return _line(409, str(error))


async def _malformed(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    return _line(422, f"{where or 'request'}: {first['msg']}")
