"""Records whose content is known from key and version, and a store's view of them."""

import functools

import numpy as np

from kvpool.core.hashing import section_digest
from kvpool.core.ssd.records import RecordBatch

NAMESPACE = bytes(range(16))


@functools.cache
def key_of(number):
    return np.random.default_rng([7, number]).integers(0, 256, 16, dtype=np.uint8)


def keys_of(numbers):
    return np.array([key_of(number) for number in numbers], np.uint8).reshape(-1, 16)


def content(number, version, size):
    return np.random.default_rng([number, version, size]).integers(0, 256, size, dtype=np.uint8)


def batch_of(records, *, namespace=NAMESPACE, sections=1, fidelity=1, named=True):
    """records: (number, version, size) each. `named` ones are objects, which a later version replaces."""
    keys = keys_of([number for number, _, _ in records])
    payloads = [content(*record) for record in records]
    count = len(records)
    return RecordBatch(
        keys,
        np.tile(np.frombuffer(namespace, np.uint8), (count, 1)),
        np.full(count, fidelity, np.uint8),
        np.full(count, sections, np.uint8),
        digests_of(keys, payloads, sections),
        payloads,
        [name_of(number) for number, _, _ in records] if named else (),
    )


def name_of(number):
    return f"object/{number}".encode()


def digests_of(keys, payloads, sections):
    digests = np.zeros((len(payloads), sections), np.uint64)
    for row, (key, payload) in enumerate(zip(keys, payloads, strict=True)):
        step = len(payload) // sections
        for i in range(sections):
            digests[row, i] = section_digest(payload[i * step : (i + 1) * step], key.tobytes(), i)
    return digests


def read_all(store, numbers):
    """Payload of each number as bytes, None where absent. What reads back has the digests it came with."""
    keys = keys_of(numbers)
    facts = store.describe(keys)
    targets = [np.zeros(size, np.uint8) for size in facts.sizes.tolist()]
    answer = store.read(keys, targets)
    assert not (answer.good & ~facts.present).any()
    return {
        number: target.tobytes() if good else None
        for number, target, good in zip(numbers, targets, answer.good.tolist(), strict=True)
    }
