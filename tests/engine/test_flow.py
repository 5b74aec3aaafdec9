"""Requests through the engine: reuse, injected and exported blocks, split requests, aborts, bounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.torch.engine import Engine
from engines.torch.generate import generate
from engines.torch.model import LoadedModel
from engines.torch.request import Finish, Phase, Sampling
from engines.torch.wire import prompt_keys
from kvpool.core.errors import BadArgument, KvpoolError, Overloaded, Reason, UnknownRequest
from kvpool.core.hashing import block_keys, tail_key
from kvpool.v1 import engine_pb2

from .conftest import EXACT, SMALL
from .driving import cached_contents, exported, fill, prompt, request, run


def all_free(engine: Engine) -> bool:
    load = engine.load()
    engine.check_invariants()
    return load.running == load.waiting == 0 and load.kv_tokens_free == load.kv_tokens_total


def test_reused_is_recomputed(engine: Engine, llama: LoadedModel) -> None:
    """Fast mode: tokens are equal, KV up to rounding."""
    tokens = prompt(1, 150).tolist()
    answer = generate(engine, [tokens], Sampling(30, ignore_eos=True))[0].tokens
    longer = [*tokens, *answer, *prompt(2, 20).tolist()]
    engine.submit(request(engine, np.array(longer)))
    reused = run(engine)
    assert reused.times["r"].cached_tokens_hbm == (150 + 29) // 16 * 16
    fresh = Engine(llama, SMALL)
    fresh.submit(request(fresh, np.array(longer)))
    assert run(fresh).tokens == reused.tokens
    ours, theirs = cached_contents(engine), cached_contents(fresh)
    assert set(theirs) <= set(ours)
    for key, content in theirs.items():
        kept = np.frombuffer(ours[key], dtype=np.float32)
        assert np.allclose(kept, np.frombuffer(content, dtype=np.float32), atol=1e-3)


def test_one_prompt_token_is_always_left_to_compute(engine: Engine) -> None:
    tokens = prompt(1, 64)
    for name in ("cold", "warm"):
        engine.submit(request(engine, tokens, name))
        log = run(engine)
    assert log.times["warm"].cached_tokens_hbm == 48 and log.times["warm"].computed_tokens == 16


def test_other_roots_share_nothing(engine: Engine) -> None:
    tokens = prompt(1, 64)
    engine.submit(request(engine, tokens, "a"))
    run(engine)
    engine.submit(replace(request(engine, tokens, "b"), root=b"another tenant's"))
    assert run(engine).times["b"].cached_tokens_hbm == 0


def test_block_keys_can_be_sha256(llama: LoadedModel) -> None:
    engine = Engine(llama, replace(SMALL, block_hash="sha256/1"))
    tokens = prompt(1, 70)
    submit = engine_pb2.Submit(token_ids=tokens.astype("<u4").tobytes(), root_key=engine.namespace.id())
    generate(engine, [tokens.tolist()], Sampling(1))
    assert engine.namespace.hash == "sha256/1" and engine.namespace != Engine(llama, SMALL).namespace
    keys = block_keys(engine.namespace.id(), tokens, 16, "sha256/1")
    assert {key.tobytes() for key in keys} == {key.tobytes() for key in engine.cached_keys()}
    handed_off = prompt_keys(submit, 16, "sha256/1")
    assert np.array_equal(handed_off[:4], keys)
    assert handed_off[4].tobytes() == tail_key(keys[3].tobytes(), tokens[64:], "sha256/1")


def test_stop_tokens_and_end_of_sequence(engine: Engine, llama: LoadedModel) -> None:
    tokens = prompt(3, 40)
    free = generate(engine, [tokens.tolist()], Sampling(20, ignore_eos=True))[0].tokens
    wanted = next(t for i, t in enumerate(free) if i and t not in free[:i])
    stopped = generate(engine, [tokens.tolist()], Sampling(20, stop_token_ids=(wanted,), ignore_eos=True))[0]
    assert stopped.finish is Finish.STOP and stopped.tokens == free[: free.index(wanted) + 1]
    ending = replace(llama, eos_token_ids=(wanted,))
    stopped = generate(Engine(ending, SMALL), [tokens.tolist()], Sampling(20))[0]
    assert stopped.finish is Finish.STOP and stopped.tokens == free[: free.index(wanted) + 1]


@pytest.mark.parametrize("config", [SMALL, EXACT], ids=["fast", "exact"])
@pytest.mark.parametrize("length", [1, 15, 16, 100, 128])
def test_a_split_request_answers_like_one_engine(llama: LoadedModel, config: object, length: int) -> None:
    tokens, stored = prompt(length, length), {}
    sampling = {"temperature": 0.9, "seed": 4}
    whole = Engine(llama, config)
    whole.submit(request(whole, tokens, max_tokens=40, **sampling))
    expected = run(whole).tokens["r"]

    prefill, decode = Engine(llama, config), Engine(llama, config)
    decode.submit(request(decode, tokens, max_tokens=40, phase=Phase.DECODE, pull_tokens=length, **sampling))
    assert run(decode).tokens == {}
    (pull,) = decode.take_pulls()
    prefill.submit(request(prefill, tokens, max_tokens=40, phase=Phase.PREFILL, publish=True, **sampling))
    first = run(prefill)
    assert first.finish["r"] is Finish.HANDED_OFF and len(first.tokens["r"]) == 1
    exports = exported(prefill, stored)
    assert sum(len(e.keys) for e in exports) == -(-length // 16) == len(pull.keys)
    assert [e.tail_tokens for e in exports if e.tail_tokens] == ([length % 16] if length % 16 else [])
    assert fill(decode, pull, stored) == len(pull.keys)
    decode.blocks_arrived(pull, len(pull.keys), 1000)
    decode.pull_ended(pull)
    decode.first_token("r", first.tokens["r"][0])
    decode.first_token("r", first.tokens["r"][0])
    log = run(decode)
    assert first.tokens["r"] + log.tokens["r"] == expected
    assert log.times["r"].computed_tokens == 0 and log.times["r"].cached_tokens_pool == length
    assert all_free(prefill) and all_free(decode)


@pytest.mark.parametrize("arrived", [0, 1, 3, 6])
@pytest.mark.parametrize("token_first", [True, False])
def test_what_does_not_arrive_is_computed(llama: LoadedModel, arrived: int, token_first: bool) -> None:
    tokens, stored = prompt(7, 100), {}
    prefill = Engine(llama, EXACT)
    prefill.submit(request(prefill, tokens, phase=Phase.PREFILL, publish=True, max_tokens=30))
    first = run(prefill).tokens["r"][0]
    exported(prefill, stored)
    whole = Engine(llama, EXACT)
    whole.submit(request(whole, tokens, max_tokens=30))
    expected = run(whole).tokens["r"]

    decode = Engine(llama, EXACT)
    decode.submit(request(decode, tokens, phase=Phase.DECODE, pull_tokens=100, max_tokens=30))
    decode.step()
    (pull,) = decode.take_pulls()
    if token_first:
        decode.first_token("r", first)
    fill(decode, pull, stored, arrived)
    decode.blocks_arrived(pull, arrived, 1)
    assert not decode.has_work(), "nothing is computed while blocks may still arrive"
    decode.pull_ended(pull)
    log = run(decode)
    if not token_first:
        assert log.tokens == {}
        decode.first_token("r", first)
        log = run(decode)
    assert [first, *log.tokens["r"]] == expected
    assert log.times["r"].pull_failures == 7 - arrived
    assert all_free(decode)


def test_pulled_prefixes_extend_own_ones(llama: LoadedModel) -> None:
    tokens, stored = prompt(8, 200), {}
    source = Engine(llama, EXACT)
    source.submit(request(source, tokens, publish=True))
    expected = run(source).tokens
    exported(source, stored)
    engine = Engine(llama, EXACT)
    engine.submit(request(engine, tokens[:70], "short", max_tokens=1))
    run(engine)
    engine.submit(request(engine, tokens, pull_tokens=160, publish=True))
    run(engine)
    (pull,) = engine.take_pulls()
    assert pull.first == 4 and len(pull.keys) == 6
    engine.blocks_arrived(pull, fill(engine, pull, stored), 1)
    engine.pull_ended(pull)
    log = run(engine)
    assert log.tokens == expected
    times = log.times["r"]
    assert (times.cached_tokens_hbm, times.cached_tokens_pool, times.computed_tokens) == (64, 96, 40)
    assert [e.first for e in exported(engine, {})] == [10], "what was pulled is published already"


def test_prefill_publishes_what_it_reused_too(llama: LoadedModel) -> None:
    engine, stored = Engine(llama, SMALL), {}
    for name in ("cold", "warm"):
        engine.submit(request(engine, prompt(9, 90), name, phase=Phase.PREFILL, publish=True))
        run(engine)
        exports = exported(engine, stored)
        assert sum(len(e.keys) for e in exports) == 6 and exports[-1].tail_tokens == 10
    assert exports[0].first == 0 and len(exports[0].keys) == 5, "hits are published without waiting for a step"


def test_abort_frees_everything_at_any_time(engine: Engine) -> None:
    for steps in range(12):
        engine.submit(request(engine, prompt(20 + steps, 150), "a", max_tokens=20))
        engine.submit(request(engine, prompt(40 + steps, 30), "b", max_tokens=20))
        for _ in range(steps):
            engine.step()
        assert engine.abort("a") and engine.abort("b") and not engine.abort("a")
        events = [e for e in engine.step() if e.finish is not Finish.NONE]
        assert {(e.request_id, e.finish) for e in events} == {("a", Finish.ABORT), ("b", Finish.ABORT)}
        assert all_free(engine)


def test_lent_blocks_survive_an_abort(engine: Engine) -> None:
    """Somebody may still write to a pull's blocks and read an export's: they are not handed out before their return."""
    engine.submit(request(engine, prompt(1, 100), "pulling", pull_tokens=96))
    engine.submit(request(engine, prompt(2, 64), "exporting", publish=True))
    engine.step()
    (pull,), exports = engine.take_pulls(), engine.take_exports()
    assert exports and engine.abort("pulling") and engine.abort("exporting")
    engine.step()
    lent = len(pull.blocks) + sum(len(e.blocks) for e in exports)
    load = engine.load()
    assert load.kv_tokens_total - load.kv_tokens_free == lent * 16
    engine.blocks_arrived(pull, 2, 1)
    engine.pull_ended(pull)
    for export in exports:
        engine.export_ended(export)
    assert all_free(engine)
    assert pull.keys[0].tobytes() not in {k.tobytes() for k in engine.cached_keys()}


def test_a_deadline_ends_a_request(llama: LoadedModel) -> None:
    now_us = [1000]
    engine = Engine(llama, SMALL, clock_us=lambda: now_us[0])
    engine.submit(request(engine, prompt(1, 20), max_tokens=50, deadline_us=5000))
    engine.step()
    assert engine.next_deadline_us() == 5000
    now_us[0] = 5000
    log = run(engine)
    assert log.finish["r"] is Finish.ERROR and "deadline" in log.error["r"]
    assert all_free(engine) and engine.next_deadline_us() is None


def test_capacity_is_never_promised_twice(llama: LoadedModel) -> None:
    engine = Engine(llama, replace(SMALL, kv_tokens=16 * 12, waiting_max=4))
    for i in range(4):
        engine.submit(request(engine, prompt(i, 50), str(i), max_tokens=40))
    with pytest.raises(Overloaded):
        engine.submit(request(engine, prompt(9, 50), "more"))
    engine.step()
    assert engine.load().running == 2 and engine.load().waiting == 2
    log = run(engine)
    assert all(len(log.tokens[str(i)]) == 40 or i < 2 for i in range(4)) and len(log.finish) == 4
    assert all_free(engine)


REFUSED = [
    ({"prompt": np.zeros(0, dtype=np.uint32)}, Reason.BAD_ARGUMENT),
    ({"prompt": np.array([160], dtype=np.uint32)}, Reason.BAD_ARGUMENT),
    ({"prompt": np.full(1024, 5, dtype=np.uint32)}, Reason.CONTEXT_TOO_LONG),
    ({"prompt": np.full(600, 5, dtype=np.uint32)}, Reason.NO_CAPACITY),
    ({"root": b"short"}, Reason.BAD_ARGUMENT),
    ({"id": ""}, Reason.BAD_ARGUMENT),
    ({"sampling": Sampling(0)}, Reason.BAD_ARGUMENT),
    ({"sampling": Sampling(1, temperature=-1.0)}, Reason.BAD_ARGUMENT),
    ({"sampling": Sampling(1, temperature=float("nan"))}, Reason.BAD_ARGUMENT),
    ({"sampling": Sampling(1, top_p=0.0)}, Reason.BAD_ARGUMENT),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED)
def test_impossible_requests_are_refused(llama: LoadedModel, change: dict[str, object], reason: Reason) -> None:
    engine = Engine(llama, replace(SMALL, kv_tokens=512))
    with pytest.raises(KvpoolError) as caught:
        engine.submit(replace(request(engine, prompt(1, 10)), **change))  # type: ignore[arg-type]
    assert caught.value.reason is reason and all_free(engine)


def test_unknown_requests_and_wrong_phases(engine: Engine) -> None:
    with pytest.raises(UnknownRequest):
        engine.first_token("nobody", 3)
    engine.submit(request(engine, prompt(1, 10)))
    with pytest.raises(BadArgument):
        engine.first_token("r", 3)
    with pytest.raises(BadArgument, match="taken"):
        engine.submit(request(engine, prompt(1, 10)))


def test_samples_say_what_was_computed(engine: Engine) -> None:
    engine.submit(request(engine, prompt(1, 150), max_tokens=5))
    run(engine)
    samples = engine.take_samples()
    assert [(s.new_tokens, s.cached_tokens) for s in samples.prefill] == [(150, 0)]
    assert [(s.batch, s.kv_tokens) for s in samples.decode] == [(1, n) for n in (151, 152, 153, 154)]
    assert samples.finished_prefills == ["r"] and not engine.take_samples().decode


ACTION = st.sampled_from(["submit", "pull", "export", "lend", "abort", "step", "step", "fail"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(ACTION, st.integers(0, 5)), max_size=60))
def test_whatever_happens_nothing_is_left(llama: LoadedModel, actions: list[tuple[str, int]]) -> None:
    engine = Engine(llama, replace(EXACT, kv_tokens=16 * 20, batch_max=4))
    stored: dict[bytes, bytes] = {}
    pulls, exports, expected = [], [], {}
    count = 0
    finished: dict[str, Finish] = {}

    def step() -> None:
        for event in engine.step():
            if event.finish is not Finish.NONE:
                assert event.request_id not in finished
                finished[event.request_id] = event.finish
        pulls.extend(engine.take_pulls())
        exports.extend(engine.take_exports())

    for action, number in actions:
        if action == "submit":
            count += 1
            name, tokens = str(count), prompt(number % 3, 20 + 17 * number)
            engine.submit(request(engine, tokens, name, max_tokens=6, pull_tokens=64 * (number % 2), publish=True))
            expected[name] = True
        elif action in ("pull", "fail") and pulls:
            pull = pulls.pop()
            engine.blocks_arrived(pull, fill(engine, pull, stored) if action == "pull" else 0, 1)
            engine.pull_ended(pull)
        elif action == "export" and exports:
            engine.export_ended(exports.pop())
        elif action == "lend":
            lent = engine.lend_cached([key.tobytes() for key in engine.cached_keys()[::-1]])
            exports.append(lent)
        elif action == "abort" and count:
            engine.abort(str(1 + number % count))
        else:
            step()
        engine.check_invariants()
    while expected.keys() - finished.keys() or pulls or exports:
        step()
        for pull in pulls:
            engine.pull_ended(pull)
        for export in exports:
            engine.export_ended(export)
        pulls.clear(), exports.clear()
    assert all_free(engine) and finished.keys() == expected.keys()


def test_requests_that_wait_for_others_hold_only_a_share(llama: LoadedModel) -> None:
    """Two instances that prefill for each other must not each hold what the other needs."""
    engine = Engine(llama, replace(EXACT, kv_tokens=16 * 16, batch_max=8))
    for i in range(6):
        engine.submit(request(engine, prompt(i, 30), f"d{i}", phase=Phase.DECODE, max_tokens=30, pull_tokens=30))
    engine.submit(request(engine, prompt(9, 100), "p", phase=Phase.PREFILL))
    log = run(engine)
    assert log.finish == {"p": Finish.HANDED_OFF}
    pulls = engine.take_pulls()
    assert len(pulls) == 2 and engine.load().waiting == 4
    for pull in pulls:
        engine.pull_ended(pull)
    # With its first token a request depends on nobody any more.
    for i in reversed(range(6)):
        engine.first_token(f"d{i}", 7)
    while len(log.finish) < 7:
        run(engine, log)
        for pull in engine.take_pulls():
            engine.pull_ended(pull)
    assert all(log.finish[f"d{i}"] is Finish.LENGTH and len(log.tokens[f"d{i}"]) == 29 for i in range(6))
    assert all_free(engine)


@pytest.mark.parametrize("config", [SMALL, EXACT], ids=["fast", "exact"])
def test_what_a_block_held_before_reaches_nobody(llama: LoadedModel, config: object) -> None:
    """Attention reads past the last token under a mask, which does not stop a nan."""
    answers = []
    for before in (0.0, float("nan")):
        engine = Engine(llama, config)
        engine.cache[:-1] = before
        for i in range(3):
            engine.submit(request(engine, prompt(i, 40 + 20 * i), str(i), max_tokens=20))
        answers.append(run(engine).tokens)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("config", [SMALL, EXACT], ids=["fast", "exact"])
@pytest.mark.parametrize("arrived", [0, 2])
def test_bytes_that_were_not_verified_reach_nobody(llama: LoadedModel, config: object, arrived: int) -> None:
    tokens, stored = prompt(7, 100), {}
    prefill = Engine(llama, config)
    prefill.submit(request(prefill, tokens, phase=Phase.PREFILL, publish=True, max_tokens=30))
    first = run(prefill).tokens["r"][0]
    exported(prefill, stored)
    whole = Engine(llama, config)
    whole.submit(request(whole, tokens, max_tokens=30))
    expected = run(whole).tokens["r"]

    decode = Engine(llama, config)
    decode.submit(request(decode, tokens, phase=Phase.DECODE, pull_tokens=100, max_tokens=30))
    decode.step()
    (pull,) = decode.take_pulls()
    decode.cache[pull.blocks.tolist()] = float("nan")
    fill(decode, pull, stored, arrived)
    decode.blocks_arrived(pull, arrived, 1)
    decode.pull_ended(pull)
    decode.first_token("r", first)
    assert [first, *run(decode).tokens["r"]] == expected


def test_a_name_is_free_once_its_end_was_told(engine: Engine) -> None:
    tokens = prompt(1, 20)
    engine.submit(request(engine, tokens))
    engine.abort("r")
    with pytest.raises(BadArgument, match="taken"):
        engine.submit(request(engine, tokens))
    assert [e.finish for e in engine.step()] == [Finish.ABORT]
    engine.submit(request(engine, tokens))
    assert run(engine).finish == {"r": Finish.LENGTH}
