"""A child process of ``moemesh up``: its last lines are kept, whatever it writes."""

import asyncio
import os

from shared.cli.children import Child

CHATTY = "import sys; sys.stderr.write('x' * 200_000 + '\\nafter\\n')"


def test_a_line_of_any_length_does_not_end_the_reading() -> None:
    async def last_line() -> str:
        seen: list[str] = []
        child = Child("chatty", ["-c", CHATTY], os.environ, lambda _, line: seen.append(line))
        await child.start()
        assert await child.wait() == 0
        assert seen == list(child.lines)
        return seen[-1]

    assert asyncio.run(last_line()) == "after"
