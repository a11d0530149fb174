"""The engines behind a server, by the names under which clients ask for them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from runtime.errors import UsageError
from runtime.model import Qwen3VLModel
from runtime.server.errors import ApiError
from runtime.server.settings import ServerSettings
from runtime.server.turns import Turns
from runtime.shown import shown


@dataclass(frozen=True)
class Served:
    """An opened engine with a name.

    Attributes:
        name: Clients ask for it by this `model`.
        model: The engine.
        settings: The server's limits.
        created: When it was opened, in seconds since 1970.
        turns: Whose prompts are read.
    """

    name: str
    model: Qwen3VLModel
    settings: ServerSettings
    created: int = field(default_factory=lambda: int(time.time()))
    turns: Turns = field(default_factory=Turns, repr=False, compare=False)

    @property
    def fingerprint(self) -> str:
        """What answers were made by, for `system_fingerprint`: target and the exporter's version."""
        manifest = self.model.manifest
        return f"{manifest.target}-{manifest.versions.get('qwen3vl-export', 'unknown')}"

    def description(self) -> dict[str, Any]:
        """Return the entry of `/v1/models`."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "qwen3vl-export",
            "max_model_len": self.model.max_context,
            "target": self.model.manifest.target,
        }


class Engines(Mapping[str, Served]):
    """The engines of a server by name.

    Args:
        served: At least one; no two with the same name.

    Raises:
        UsageError: There is none, or two have one name.
    """

    def __init__(self, served: list[Served]) -> None:
        self._served = {each.name: each for each in served}
        if len(self._served) < len(served) or not served:
            raise UsageError(
                f"{len(served)} engines with {len(self._served)} different names",
                remedy="give each a name of its own: NAME=ENGINE",
            )

    def __getitem__(self, name: str) -> Served:
        return self._served[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._served)

    def __len__(self) -> int:
        return len(self._served)

    def asked_for(self, name: str | None) -> Served:
        """Return the engine that a request names; one that names none gets the only one.

        Raises:
            ApiError: There is no such engine, or none was named and there are several.
        """
        known = ", ".join(self._served)
        if name is None and len(self._served) == 1:
            return next(iter(self._served.values()))
        if name is None:
            raise ApiError(400, f"model is missing. Remedy: pass one of: {known}", param="model")
        found = self._served.get(name)
        if found is None:
            message = f"the model {shown(name)} does not exist. Remedy: pass one of: {known}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return found

    @property
    def max_requests(self) -> int:
        """Requests that the engines run and queue."""
        limits = [each.model.limits for each in self.values()]
        return sum(each.max_sequences + each.max_queue for each in limits)

    def close(self, *, drain: bool) -> None:
        """Close all engines."""
        for each in self.values():
            each.model.close(drain=drain)
