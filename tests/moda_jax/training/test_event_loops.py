"""A loop that closes while tasks are under way waits for them."""

import asyncio
import threading
import time

import pytest
from orbax.checkpoint._src import asyncio_utils

from moda_jax.training import event_loops


@pytest.fixture
def installed():
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(asyncio.DefaultEventLoopPolicy())
    event_loops.install()
    yield
    asyncio.set_event_loop_policy(before)


def writes(done):
    """One write fails at once, another takes a while."""

    async def fail():
        raise OSError("no space left")

    async def write():
        await asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.2)
        done.append("written")

    async def both():
        await asyncio.gather(fail(), write())

    return both()


def test_orbax_waits_for_its_other_writes(installed):
    done, errors = [], []

    def save():
        try:
            asyncio_utils.run_sync(writes(done))
        except OSError as error:
            errors.append(str(error))

    thread = threading.Thread(target=save)
    thread.start()
    thread.join()
    assert errors == ["no space left"]
    assert done == ["written"]


def test_a_loop_without_tasks_just_closes(installed):
    loop = asyncio.new_event_loop()
    assert isinstance(loop, event_loops.DrainingEventLoop)
    assert loop.run_until_complete(asyncio.sleep(0, "result")) == "result"
    loop.close()
    loop.close()
    assert loop.is_closed()


def test_another_policy_is_left_alone():
    class Chosen(asyncio.DefaultEventLoopPolicy):
        pass

    before, chosen = asyncio.get_event_loop_policy(), Chosen()
    try:
        asyncio.set_event_loop_policy(chosen)
        event_loops.install()
        assert asyncio.get_event_loop_policy() is chosen
    finally:
        asyncio.set_event_loop_policy(before)
