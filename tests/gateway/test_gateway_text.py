"""Text as it grows token by token: never half a character, never part of a stop string, whatever the cuts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from scheduler.gateway.text import Detokenizer, StopScanner, TemplateFailed, TextStream, Tokenizer, load_tokenizer
from tests.gateway.made_tokenizer import make_tokenizer

TINY_LLAMA = Path(__file__).parents[1] / "models" / "tiny-llama"


@pytest.fixture(scope="module")
def loaded(tokenizer: str) -> Tokenizer:
    return load_tokenizer(tokenizer)


def bytes_decode(ids: Sequence[int]) -> str:
    """A token is a byte: the hardest case there is."""
    return bytes(ids).decode(errors="replace")


def detokenize(ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(bytes_decode)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@given(st.text(max_size=120))
@example("a€😀e\u0301" * 30)
def test_pieces_make_the_text_and_no_piece_has_half_a_character(text: str) -> None:
    pieces = detokenize(list(text.encode()))
    assert "".join(pieces) == text
    assert sum("\ufffd" in piece for piece in pieces) == text.count("\ufffd")


@given(st.binary(max_size=200))
@example(b"\xff" * 200)
@example(b"\xf0\x9f" * 90 + b"ok")
def test_bytes_that_are_no_text_come_out_as_a_decoder_would_show_them(raw: bytes) -> None:
    assert "".join(detokenize(list(raw))) == raw.decode(errors="replace")


def test_a_character_waits_for_its_last_byte() -> None:
    detokenizer = Detokenizer(bytes_decode)
    assert [detokenizer.push(b) for b in "é€😀".encode()] == ["", "é", "", "", "€", "", "", "", "😀"]


def test_spaces_between_words_survive_where_a_word_alone_loses_them() -> None:
    """SentencePiece drops the space before the first word it decodes: a token by itself reads differently."""
    vocabulary = {"<unk>": 0, "▁Hello": 1, "▁big": 2, "▁world": 3, "s": 4, "<0xE2>": 5, "<0x82>": 6, "<0xAC>": 7}
    fast = FastTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    detokenizer = Detokenizer(fast.decode)
    ids = [1, 2, 3, 4, 5, 6, 7, 3]
    pieces = [detokenizer.push(i) for i in ids]
    assert "".join(pieces) == fast.decode(ids) == "Hello big worlds€ world"
    assert not any("\ufffd" in piece for piece in pieces)


# ---------------------------------------------------------------- stop strings


def char_by_char(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The oracle: the text ends where the first stop string is complete, the longest where several are."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(
    st.text("abc", max_size=40),
    st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(text: str, stops: list[str], rng: random.Random) -> None:
    scanner = StopScanner(stops)
    shown, at = "", 0
    while at < len(text):
        cut = at + rng.randint(1, 6)
        shown += scanner.push(text[at:cut])
        at = cut
        # What was shown never has to be taken back.
        assert char_by_char(text, stops)[0].startswith(shown)
    if not scanner.matched:
        shown += scanner.flush()
    assert (shown, scanner.matched) == char_by_char(text, stops)


def test_stop_string_over_token_borders_and_inside_characters() -> None:
    stream = TextStream(bytes_decode, ["→end", "zz"])
    shown = [stream.push(b) for b in "go →en →end never".encode()]
    assert "".join(shown) == "go →en "
    assert stream.stopped and stream.flush() == ""


def test_held_text_comes_out_at_the_end() -> None:
    stream = TextStream(bytes_decode, ["</answer>"])
    assert "".join(stream.push(b) for b in b"x </ans") == "x "
    assert stream.flush() == "</ans"
    assert not stream.stopped


# ---------------------------------------------------------------- tokenizers


def test_encode_and_decode(loaded: Tokenizer) -> None:
    ids = loaded.encode("hello wörld")
    assert ids.dtype.name == "uint32"
    assert loaded.decode(ids.tolist()) == "hello wörld"
    assert loaded.decode([2, *ids.tolist(), 2]) == "hello wörld"
    assert loaded.token_text(2) == "<|end|>"


def test_chat_template(loaded: Tokenizer) -> None:
    ids = loaded.encode_chat([{"role": "user", "content": "hello"}])
    assert ids.tolist() == [1, 3, *loaded.encode("hello").tolist(), 2, 4]
    with_option = loaded.encode_chat([{"role": "user", "content": "hello"}], {"shout": "w"})
    assert with_option.tolist() == [*ids.tolist(), *loaded.encode("w").tolist()]


def test_chat_template_that_is_missing_or_fails(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(TemplateFailed, match="no chat template"):
        load_tokenizer(make_tokenizer(tmp_path / "none", chat_template="")).encode_chat(messages)
    failing = load_tokenizer(make_tokenizer(tmp_path / "bad", chat_template="{{ raise_exception('no roles') }}"))
    with pytest.raises(TemplateFailed, match="no roles"):
        failing.encode_chat(messages)
    with pytest.raises(TemplateFailed, match="tokenize"):
        failing.encode_chat(messages, {"tokenize": True})


def test_the_models_own_tokenizer_streams_what_it_decodes() -> None:
    tokenizer = load_tokenizer(str(TINY_LLAMA))
    text = "def größe(x):\n    return '→ 😀😀', x  # naïve — ok\n\n\n\tÅÅ" * 5
    ids = tokenizer.encode(text).tolist()
    detokenizer = Detokenizer(tokenizer.decode)
    pieces = [detokenizer.push(i) for i in ids]
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces)
