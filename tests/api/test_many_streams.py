"""64 concurrent streams finish, and every joined stream is the text that the same request gives at once."""

import asyncio

from openai import AsyncOpenAI

STREAMS = 64


async def test_sixty_four_streams_finish_with_the_texts_of_plain_requests(api_url: str) -> None:
    async with AsyncOpenAI(base_url=f"{api_url}/v1", api_key="none", timeout=240, max_retries=0) as client:
        model = (await client.models.list()).data[0].id

        def ask(seed: int) -> dict[str, object]:
            return {
                "model": model,
                "prompt": f"Chapter {seed}. And",
                "max_tokens": 12,
                "seed": seed,
                "temperature": 0.9,
            }

        async def streamed(seed: int) -> str:
            stream = await client.completions.create(**ask(seed), stream=True)  # type: ignore[call-overload]
            return "".join([chunk.choices[0].text async for chunk in stream])

        async def plain(seed: int) -> str:
            return (await client.completions.create(**ask(seed))).choices[0].text  # type: ignore[call-overload]

        streams = await asyncio.gather(*(streamed(seed) for seed in range(STREAMS)))
        texts = await asyncio.gather(*(plain(seed) for seed in range(STREAMS)))
        assert streams == texts
