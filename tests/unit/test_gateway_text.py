"""Incremental detokenization and stop strings: the client sees exactly the text, in whole characters."""

import asyncio
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE

from services.gateway.text import MAX_PENDING, Detokenizer, OutputText, StopStrings
from services.gateway.tokenizer import Tokenizer as GatewayTokenizer
from shared.models.source import DEMO

DEMO_TOKENIZER = GatewayTokenizer(DEMO / "tokenizer.json")
TEXT = "In the beginning — 漢字 😀 é\n\tdef f(x): return 'ü'"


def sentencepiece_like() -> Tokenizer:
    """Byte fallback, a mark for spaces, a decoder that strips the first space: as Llama and Mixtral have it."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁a", "▁the", "b", "c", "é", "漢"]
    tokenizer = Tokenizer(BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


SP = sentencepiece_like()
SP_SPECIAL = frozenset({0, 1, 2})


def streamed(detokenizer: Detokenizer, tokens: list[int]) -> list[str]:
    return [*(detokenizer.push(t) for t in tokens), detokenizer.flush()]


demo_ids = st.lists(st.integers(0, DEMO_TOKENIZER.size - 1), max_size=60)
byte_ids = st.lists(st.integers(1, 256), max_size=60)  # single bytes: mostly broken UTF-8
multibyte = st.text(max_size=30).map(lambda s: DEMO_TOKENIZER._encode(s, False))


@given(st.one_of(demo_ids, multibyte, byte_ids))
def test_joined_pieces_are_the_decoded_text(tokens):
    assert "".join(streamed(DEMO_TOKENIZER.detokenizer([]), tokens)) == DEMO_TOKENIZER.decode(tokens)


@given(st.text(max_size=40))
@example(TEXT)
def test_no_piece_shows_half_a_character(text):
    tokens = DEMO_TOKENIZER._encode(text, False)
    pieces = streamed(DEMO_TOKENIZER.detokenizer([]), tokens)
    assert "".join(pieces) == text
    assert all("\ufffd" not in p for p in pieces) or "\ufffd" in text


@given(st.lists(st.sampled_from([3 + 0xE6, 3 + 0xBC, 3 + 0xA2, *range(259, 266), 1, 2]), max_size=30))
def test_sentencepiece_characters_and_spaces_survive(tokens):
    """The decoder strips the space in front of the first piece; it must not do so in the middle of a stream."""
    whole = SP.decode(tokens, skip_special_tokens=True)
    pieces = "".join(streamed(Detokenizer(SP.decode, SP_SPECIAL, []), tokens))
    assert pieces.replace("\ufffd", "") == whole.replace("\ufffd", "") or "\ufffd" in whole


def test_output_keeps_the_space_that_the_prompt_makes_visible():
    the = 261
    assert SP.decode([the]) == "the"
    assert "".join(streamed(Detokenizer(SP.decode, SP_SPECIAL, [the]), [the, the])) == " the the"


def test_endless_broken_bytes_do_not_pile_up():
    """A window that grows with the output would make decoding quadratic."""
    detokenizer = DEMO_TOKENIZER.detokenizer([])
    broken = next(i for i in range(DEMO_TOKENIZER.size) if DEMO_TOKENIZER.token_bytes(i) == b"\x80")
    text = "".join(streamed(detokenizer, [broken] * 1000))
    assert text == "\ufffd" * 1000
    assert len(detokenizer._ids) <= 2 * MAX_PENDING + 2


def first_stop(text: str, stops: list[str]) -> str:
    """The text before the stop string that completes first (then: begins first), found without any cleverness."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


chars = st.text("abc é", max_size=40)
stop_lists = st.lists(st.text("abc é", min_size=1, max_size=5), max_size=4)


@given(chars, stop_lists, st.lists(st.integers(0, 40), max_size=10))
@example("xabab", ["abab", "ba"], [2])
def test_stop_strings_in_any_chunks(text, stops, cuts):
    """Never a part of a stop string is shown, and how the text was cut into chunks makes no difference."""
    expected = first_stop(text, stops)
    finder, shown = StopStrings(stops), ""
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    for a, b in pairwise(edges):
        shown += finder.push(text[a:b])
        assert expected.startswith(shown)
        if finder.found:
            break
    assert shown + ("" if finder.found else finder.flush()) == expected


@given(st.one_of(demo_ids, multibyte), stop_lists, st.integers(0, 5))
def test_output_text_is_the_text_before_the_stop(tokens, stops, min_tokens):
    output = OutputText(DEMO_TOKENIZER.detokenizer([]), stops, min_tokens)
    shown = ""
    for token in tokens:
        shown += output.push(token)
        if output.stopped is not None:
            break
    else:
        shown += output.finish()
    whole = DEMO_TOKENIZER.decode(tokens)
    assert whole.startswith(shown)
    if min_tokens == 0:
        assert shown == first_stop(whole, stops)
    assert output.stopped is not None or shown == whole


def test_stop_strings_within_min_tokens_do_not_count():
    tokens = DEMO_TOKENIZER._encode("stop and stop", False)
    output = OutputText(DEMO_TOKENIZER.detokenizer([]), ["st"], min_tokens=2)
    shown = ""
    for token in tokens:
        if output.stopped is None:
            shown += output.push(token)
    assert output.stopped == "st"
    assert shown == "stop and "


@pytest.mark.parametrize("token", range(0, DEMO_TOKENIZER.size, 37))
def test_token_bytes_are_those_that_the_decoder_writes(token):
    anchor = DEMO_TOKENIZER._encode("a", False)
    data = b"a" + DEMO_TOKENIZER.token_bytes(token)
    assert data.decode(errors="replace") == DEMO_TOKENIZER.decode([*anchor, token], skip_special=False)


async def test_encoding_a_long_text_leaves_the_event_loop_free():
    work = asyncio.create_task(DEMO_TOKENIZER.encode("a " * 200_000, special=False))
    turns = 0
    while not work.done():
        await asyncio.sleep(0.01)
        turns += 1
    assert len(work.result()) > 100_000
    assert turns > 5, "encoding kept the interpreter's lock"
