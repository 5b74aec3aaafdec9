"""Which of several schedulers is connected to where TLS checks names."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvpool.core.errors import BadArgument
from kvpool.service.scheduler_list import target


@contextmanager
def port(*, answers: bool) -> Iterator[int]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        if answers:
            bound.listen(8)
        yield int(bound.getsockname()[1])


def test_by_name_it_is_the_first_that_answers() -> None:
    with port(answers=False) as silent, port(answers=True) as one, port(answers=True) as two:
        assert target(f"127.0.0.1:{silent},127.0.0.1:{one},127.0.0.1:{two}", by_name=True) == f"127.0.0.1:{one}"
        assert target(f"127.0.0.1:{two},127.0.0.1:{one}", by_name=True) == f"127.0.0.1:{two}"
        assert target(f"[::1]:{silent},nonsense,127.0.0.1:99999,127.0.0.1:{one}", by_name=True) == f"127.0.0.1:{one}"
        assert target(f"127.0.0.1:{silent},x.invalid:1", by_name=True) == f"127.0.0.1:{silent}", "its error will say so"
        assert target("localhost:7700", by_name=True) == "localhost:7700"
    with pytest.raises(BadArgument):
        target(" , ", by_name=True)
