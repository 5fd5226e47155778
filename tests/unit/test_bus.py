"""What the bus makes of asyncio; everything that needs NATS is in tests/integration."""

import asyncio

import pytest

from shared.bus import cancellable


async def test_a_cancellation_that_comes_with_the_answer_is_heeded():
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    asking = asyncio.create_task(cancellable(asyncio.wait_for(answer, 60)))
    await asyncio.sleep(0)
    answer.set_result(1)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_an_answer_comes_through_also_in_the_cleanup_of_a_cancelled_task():
    async def cleanup() -> int:
        try:
            await asyncio.sleep(60)
        finally:
            answered.append(await cancellable(asyncio.sleep(0, 1)))
        return 0

    answered: list[int] = []
    task = asyncio.create_task(cleanup())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert answered == [1]
