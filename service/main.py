"""The HTTP service: `uvicorn --factory service.main:create_app`.

Puts the parts together; every decision is in one of them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from functools import partial

from fastapi import Depends, FastAPI
from starlette.middleware import Middleware

from service import queue
from service.api import checkpoints, docs, events, files, health, jobs, metrics, openapi, problems
from service.api.auth import Authenticated
from service.api.bodies import query_once
from service.api.context import Context
from service.api.edge import LimitedBody, Named
from service.api.heads import Heads
from service.background import Background
from service.feed import PAGE, Cursor, Feed
from service.files import Files
from service.jobs import Jobs
from service.planning import Planner
from service.results import Results
from service.settings import Settings, of_environment
from service.storage import Storage
from service.store import events as store_events
from service.store.session import Store
from service.sweep import sweep

FEED_SECONDS = 0.5
"""Between an event's commit and its way to listeners, at most about this."""

DESCRIPTION = """PPO fine-tuning as a service: post what to train, follow its metrics, download the policy.

Every request but those for this page and for health carries an API key: `Authorization: Bearer pxm_…`."""


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application. settings: by default, those of the environment."""
    settings = settings or of_environment(Settings)
    app = FastAPI(
        title="Proxima",
        version="1",
        description=DESCRIPTION,
        lifespan=partial(_lifespan, settings),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        dependencies=[Depends(query_once)],
        middleware=[
            Middleware(Named),
            Middleware(Heads),
            Middleware(LimitedBody, limit=_body_limit(settings)),
            Middleware(Authenticated),
        ],
    )
    for resource in (jobs, events, metrics, checkpoints, files, health):
        app.include_router(resource.router)
    docs.install(app)
    problems.install(app)
    openapi.install(app)
    return app


def _body_limit(settings: Settings) -> Callable[[str], int]:
    uploads = settings.max_file_bytes + files.FORM_OVERHEAD
    return lambda path: uploads if path == files.router.prefix else settings.max_body_bytes


@asynccontextmanager
async def _lifespan(settings: Settings, app: FastAPI) -> AsyncIterator[None]:
    """What the process holds open; opened here, since a store belongs to one event loop."""
    store = Store.open(settings.database_url)
    storage = Storage.open(settings.storage_url, settings.storage_options)
    background = Background()
    feed = Feed(partial(_news, store), FEED_SECONDS)
    sweep_soon = partial(background.start, "deleting bytes", partial(sweep, store, storage))
    app.state.context = Context(
        settings=settings,
        store=store,
        storage=storage,
        key_secret=settings.read_key_secret(),
        background=background,
        feed=feed,
        jobs=Jobs(store, Planner(settings, store), partial(queue.ring, settings), sweep_soon),
        files=Files(store, storage, settings.max_file_bytes, sweep_soon),
        results=Results(store, storage),
    )
    try:
        async with background.running(), feed.running():
            yield
    finally:
        await store.close()


async def _news(store: Store, cursors: Collection[Cursor]) -> store_events.News:
    async with store.read() as session:
        return await store_events.news(session, cursors, PAGE)
