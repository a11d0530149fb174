"""Tell URLs from paths, also those that `pathlib` folded."""

from __future__ import annotations

import os
import re

from runtime.errors import UsageError
from runtime.shown import shown

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):")  # two characters at least: C:\ is a drive


def scheme_of(text: str) -> str | None:
    """Return what stands before the first colon, in lower case, if it could be the scheme of a URL."""
    match = _SCHEME.match(text)
    return None if match is None else match.group(1).lower()


def check_local(source: str | os.PathLike[str], what: str) -> None:
    """Raise if `source` would have to be fetched.

    That is `scheme://…`, and `scheme:/…` unless a file has this name: `Path("http://host/a")` is `http:/host/a`.

    Args:
        source: A path, or a URL.
        what: What it names, for the message: "image", "engine".

    Raises:
        UsageError: It is a URL.
    """
    text = os.fspath(source)
    scheme = scheme_of(text)
    if scheme is None or text[len(scheme) + 1 : len(scheme) + 2] != "/":
        return
    if text[len(scheme) + 1 :].startswith("//") or not os.path.exists(text):
        raise UsageError(
            f"{what} {shown(text)}: expected a local {what}, found a URL of scheme {scheme!r}; nothing is fetched",
            remedy="pass the plain path" if scheme == "file" else f"download the {what} first and pass its path",
        )
