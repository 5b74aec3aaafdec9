"""Compiled loops over blocks and keys; their plain oracles are in the tests, or are the xxhash library.

Kernels work on arrays that the caller supplies, release the GIL and keep no state. `python -m kvpool.core.kernels`
compiles all of them into the cache.
"""
