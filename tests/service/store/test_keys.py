"""API keys: their form, what is kept of them, and what they open."""

from __future__ import annotations

import asyncio
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from service.errors import MalformedKey, NotFound, RevokedKey, UnknownKey
from service.store import keys
from service.store.models import ApiKey, Project
from service.store.session import Store

SECRET = b"a secret of the service, long enough"


# The form --------------------------------------------------------------------------------------------------


def test_a_new_key_has_the_form_of_a_key():
    text = keys.generate()
    keys.check_form(text)
    assert text.startswith("pxm_")
    assert len(text) == 4 + 8 + 32 + 6
    assert text != keys.generate()


@given(st.text())
def test_hardly_anything_else_has(text: str):
    with pytest.raises(MalformedKey):
        keys.check_form(text)


@given(st.integers(4, 49), st.sampled_from(string.ascii_letters + string.digits))
def test_a_slip_of_the_pen_is_noticed(place: int, letter: str):
    text = keys.generate()
    slip = text[:place] + letter + text[place + 1 :]
    if slip != text:
        with pytest.raises(MalformedKey):
            keys.check_form(slip)


@pytest.mark.parametrize(
    "change", [str.lower, lambda key: key[:-1], lambda key: key + "0", lambda key: key + "\n"]
)
def test_a_key_is_whole(change):
    with pytest.raises(MalformedKey):
        keys.check_form(change(keys.generate()))


# What is kept ----------------------------------------------------------------------------------------------


async def make(store: Store, project: str, text: str | None = None) -> keys.NewKey:
    async with store.write() as session:
        return await keys.create_key(session, SECRET, project, "laptop", text)


@pytest.mark.anyio
async def test_a_key_opens_its_project(store: Store, project: str, stranger: str):
    ours, theirs = await make(store, project), await make(store, stranger)
    async with store.read() as session:
        assert (await keys.find_key(session, SECRET, ours.text)).project_id == project
        assert (await keys.find_key(session, SECRET, theirs.text)).project_id == stranger


@pytest.mark.anyio
async def test_a_key_is_not_kept(store: Store, project: str):
    made = await make(store, project)
    async with store.read() as session:
        row = (await session.execute(select(ApiKey.__table__))).mappings().one()
    assert row["prefix"] == made.text[:12]
    assert made.text[12:] not in repr(row)
    assert row["digest"] == keys.digest(SECRET, made.text) != keys.digest(b"another", made.text)


@pytest.mark.anyio
async def test_what_opens_nothing_is_told_apart(store: Store, project: str):
    made = await make(store, project)
    async with store.write() as session:
        with pytest.raises(UnknownKey):
            await keys.find_key(session, SECRET, keys.generate())
        with pytest.raises(UnknownKey):
            await keys.find_key(session, b"another secret", made.text)
        with pytest.raises(MalformedKey):
            await keys.find_key(session, SECRET, made.text[:-1])
        first = (await keys.revoke_key(session, project, made.row.id)).revoked_at
        assert first is not None
        assert (await keys.revoke_key(session, project, made.row.id)).revoked_at == first
        with pytest.raises(RevokedKey):
            await keys.find_key(session, SECRET, made.text)


@pytest.mark.anyio
async def test_a_key_can_be_set_by_the_operator_if_it_is_one(store: Store, project: str):
    text = keys.generate()
    assert (await make(store, project, text)).text == text
    with pytest.raises(MalformedKey):
        await make(store, project, "password")


@pytest.mark.anyio
async def test_the_last_use_is_noted_but_not_every_use(store: Store, project: str):
    made = await make(store, project)

    async def touched() -> object:
        async with store.write() as session:
            await keys.touch_key(session, made.row.id)
            return (await keys.find_key(session, SECRET, made.text)).last_used_at

    assert made.row.last_used_at is None
    first = await touched()
    assert first is not None
    assert await touched() == first


@pytest.mark.anyio
async def test_a_stranger_revokes_and_lists_nothing(store: Store, project: str, stranger: str):
    made = await make(store, project)
    async with store.write() as session:
        with pytest.raises(NotFound):
            await keys.revoke_key(session, stranger, made.row.id)
        assert (await keys.list_keys(session, stranger)).data == []
        assert [row.id for row in (await keys.list_keys(session, project)).data] == [made.row.id]


@pytest.mark.anyio
async def test_a_project_is_made_once_however_many_ask(store: Store):
    async def ensure() -> str:
        async with store.write() as session:
            return (await keys.ensure_project(session, "new")).id

    ids = await asyncio.gather(*(ensure() for _ in range(8)))
    assert len(set(ids)) == 1
    async with store.read() as session:
        assert len((await session.scalars(select(Project))).all()) == 1
        found = await keys.find_project(session, "new")
        assert found is not None
        assert found.id == ids[0]
        assert await keys.find_project(session, "other") is None
