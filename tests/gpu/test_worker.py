"""The worker's own tests, with model and cache on the device: the same answers as one engine on that device.

The functions are those of tests/engine; the fixtures of this folder give them another model. Not among them are tests
that put a memory of their own in the cache's place.
"""

from __future__ import annotations

from tests.engine.test_exact import (  # noqa: F401
    test_arrival_order_changes_no_bit,
    test_batching_and_chunking_change_no_bit,
    test_generated_and_recomputed_kv_are_the_same_bits,
    test_reuse_changes_no_bit,
)
from tests.engine.test_hbm_source import (  # noqa: F401
    test_a_worker_pulls_from_the_hbm_of_another,
    test_readers_get_just_the_engines_bytes,
    test_reading_while_the_engine_reuses_its_blocks,
    test_what_is_gone_costs_a_failed_lease,
)
from tests.engine.test_worker import (  # noqa: F401
    node,
    stack,
    test_a_worker_alone_serves_many,
    test_aborts_and_ended_streams_leave_nothing,
    test_generated_blocks_are_pulled_by_another_worker,
    test_many_split_requests_at_once,
    test_split_requests_answer_like_one_engine,
)
