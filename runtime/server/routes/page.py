"""The page at `/`: files of the package, and nothing from elsewhere."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter, Response

from runtime.server.errors import ApiError

router = APIRouter(include_in_schema=False)
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


@router.head("/", include_in_schema=False)
@router.get("/")
async def page() -> Response:
    """Return the page."""
    return await file("index.html")


@router.get("/favicon.ico")
async def icon() -> Response:
    """Return nothing: browsers ask for it, and log an error without."""
    return Response(status_code=204)


@router.get("/page/{name}")
async def file(name: str) -> Response:
    """Return a file of the page."""
    found = resources.files("runtime.server") / "page" / name
    kind = _TYPES.get(name.rpartition(".")[2])
    # A name has no slash here; what is no file of the page is looked for in no other place.
    if kind is None or "\0" in name or not found.is_file():
        raise ApiError(404, "the page has no such file. Remedy: open / instead", code="not_found")
    return Response(found.read_bytes(), media_type=kind, headers=_HEADERS)
