"""How often the same is said, and how long something is left alone."""

from __future__ import annotations

import logging

import pytest

from engines.attached.quiet_log import QuietLog
from engines.attached.rest import Rest


def test_a_warning_that_repeats_is_said_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    quiet = QuietLog(logging.getLogger("quiet"), 10.0, lambda: now[0])
    for number in range(4):
        quiet.warning("full", "no room for %d", number)
    quiet.warning("other", "something else")
    now[0] = 110.0
    quiet.warning("full", "no room for %d", 9)
    assert [record.getMessage() for record in caplog.records] == [
        "no room for 0", "something else", "no room for 9 (and 3 more like this)",
    ]  # fmt: skip


def test_a_warning_can_show_where_it_comes_from(caplog: pytest.LogCaptureFixture) -> None:
    quiet = QuietLog(logging.getLogger("quiet"))
    try:
        raise ValueError("unforeseen")
    except ValueError as error:
        quiet.warning("bug", "this is a bug", trace=error)
    (record,) = caplog.records
    assert record.exc_info is not None and isinstance(record.exc_info[1], ValueError)
    assert record.filename == "test_quiet_log.py"


def test_a_rest_ends_by_itself_and_begins_anew() -> None:
    now = [5.0]
    rest = Rest(2.0, lambda: now[0])
    assert not rest.now
    rest.begin()
    now[0] = 6.0
    assert rest.now
    rest.begin()
    now[0] = 7.9
    assert rest.now
    now[0] = 8.0
    assert not rest.now
