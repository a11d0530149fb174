"""The client of the Hugging Face Hub, without what it logs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep the client's log off stderr, where errors of our own stand, and with `--json` nothing but JSON.

    It writes a line for each of several retries before it raises; the error that comes of them says all of it once.
    """
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
