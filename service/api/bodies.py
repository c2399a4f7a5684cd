"""How bodies and queries are read, beyond what FastAPI does: nothing in a request may be said twice.

Of what stands twice, FastAPI takes the last, and JSON readers each another one. Knows no resource.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import UploadFile

from ppo_engine.issues import Issue, shown
from service import strict_json
from service.planning import invalid

REPEATABLE = frozenset({"names", "type"})
"""What a query may give several times."""


class JsonRequest(Request):
    """A request whose JSON is read strictly."""

    async def json(self) -> Any:
        return strict_json.loads(await self.body())


class JsonRoute(APIRoute):
    """A route whose bodies are read strictly."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_strictly


async def query_once(request: Request) -> None:
    """Raises Invalid where a query gives a name twice that has one value."""
    given = request.query_params.multi_items()
    _refuse(_repeated([(name, value) for name, value in given if name not in REPEATABLE]))


async def parts_once(request: Request) -> None:
    """Raises Invalid where a form, which FastAPI has read by now, has two parts of one name."""
    _refuse(_repeated((await request.form()).multi_items()))


def _refuse(issues: Iterator[Issue]) -> None:
    if found := list(issues):
        raise invalid(found)


def _repeated(given: Sequence[tuple[str, str | UploadFile]]) -> Iterator[Issue]:
    values: dict[str, list[str | None]] = {}
    for name, value in given:
        values.setdefault(name, []).append(value.filename if isinstance(value, UploadFile) else value)
    for name, several in values.items():
        if len(several) > 1:
            msg = f"{shown(several)} given; a request gives it once: keep one of them."
            yield Issue(loc=(name,), msg=msg)
