"""Waiting for a condition, with a limit, instead of sleeping."""

import asyncio
from collections.abc import Callable

LIMIT_S = 30.0


async def until(condition: Callable[[], object], what: str = "", limit_s: float = LIMIT_S) -> None:
    """Returns when ``condition()`` is true. Raises TimeoutError that says ``what`` was waited for."""
    try:
        async with asyncio.timeout(limit_s):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    except TimeoutError as error:
        raise TimeoutError(f"not within {limit_s} s: {what or condition}") from error
