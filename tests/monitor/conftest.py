"""Coroutine tests run in an event loop of their own, with a deadline."""

from __future__ import annotations

import asyncio
import inspect

import pytest

from pyqsd.monitor import dispatcher, session

TIMEOUT = 30.0


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}

    async def run() -> None:
        await asyncio.wait_for(pyfuncitem.obj(**arguments), TIMEOUT)

    asyncio.run(run())
    return True


@pytest.fixture(autouse=True)
def patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine anything may take longer than the time after which a session lets others run: answers come at
    once in tests, except in those that ask for `impatience`."""
    slice_ = 0.0 if "impatience" in request.fixturenames else 3600.0
    monkeypatch.setattr(session, "SLICE", slice_)
    monkeypatch.setattr(dispatcher, "SLICE", slice_)


@pytest.fixture
def impatience() -> None:
    """A session lets others run after each command."""
