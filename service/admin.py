"""What an operator does from a shell: projects and API keys.

`python -m service.admin create-key --project NAME` makes a key, and the project where there is none yet. The
key is shown this once. `list-keys --project NAME` and `revoke-key --project NAME KEY_ID` do as they say.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from sqlalchemy.ext.asyncio import AsyncSession

from service import migrate
from service.errors import ServiceError
from service.settings import Settings, of_environment
from service.store import keys
from service.store.session import Store, driver_url

_PAGE = 100


class UnknownProject(ServiceError):
    """No project has this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no project {name!r}; create-key makes one.")


class NoSchema(ServiceError):
    """The database is not ready for this release."""

    def __init__(self, url: str) -> None:
        super().__init__(
            f"The database {driver_url(url)!r} has not the schema of this release. If it is the one meant, "
            "run 'python -m service.migrate' first; else set PROXIMA_DATABASE_URL, or PROXIMA_DATA_DIR (that "
            "of make serve is .proxima)."
        )


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        for line in asyncio.run(_run(of_environment(Settings), arguments)):
            sys.stdout.write(line + "\n")
    except ServiceError as error:
        sys.stderr.write(f"{error.detail}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m service.admin", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create-key", help="make a key, and the project where there is none yet")
    create.add_argument("--project", required=True, help="the project's name")
    create.add_argument("--name", default="key", help="what the key is called in lists")
    listing = commands.add_parser("list-keys", help="the keys of a project, newest first")
    listing.add_argument("--project", required=True)
    revoke = commands.add_parser("revoke-key", help="close a key for good")
    revoke.add_argument("--project", required=True)
    revoke.add_argument("key_id", help="as list-keys shows it")
    return parser


async def _run(settings: Settings, arguments: argparse.Namespace) -> list[str]:
    if await asyncio.to_thread(migrate.pending, settings.database_url):
        raise NoSchema(settings.database_url)
    store = Store.open(settings.database_url)
    try:
        if arguments.command == "create-key":
            return [await create_key(store, settings.read_key_secret(), arguments.project, arguments.name)]
        if arguments.command == "list-keys":
            return await _list_keys(store, arguments.project)
        return [await _revoke_key(store, arguments.project, arguments.key_id)]
    finally:
        await store.close()


async def create_key(store: Store, secret: bytes, project: str, name: str) -> str:
    """The text of a new key for the project of this name, which is made where there is none yet."""
    async with store.write() as session:
        row = await keys.ensure_project(session, project)
        return (await keys.create_key(session, secret, row.id, name)).text


async def _project_id(session: AsyncSession, name: str) -> str:
    project = await keys.find_project(session, name)
    if project is None:
        raise UnknownProject(name)
    return project.id


async def _list_keys(store: Store, project: str) -> list[str]:
    lines: list[str] = []
    after: str | None = None
    async with store.read() as session:
        project_id = await _project_id(session, project)
        while True:
            page = await keys.list_keys(session, project_id, after=after, limit=_PAGE)
            for key in page.data:
                ended = f"revoked {key.revoked_at:%Y-%m-%d %H:%M}" if key.revoked_at else "open"
                lines.append(f"{key.id}  {key.prefix}…  {key.created_at:%Y-%m-%d %H:%M}  {ended}  {key.name}")
            if not page.has_more:
                return lines
            after = page.data[-1].id


async def _revoke_key(store: Store, project: str, key_id: str) -> str:
    async with store.write() as session:
        key = await keys.revoke_key(session, await _project_id(session, project), key_id)
        return f"{key.id} is revoked."


if __name__ == "__main__":
    raise SystemExit(main())
