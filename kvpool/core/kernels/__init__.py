"""Compiled loops over blocks and keys, each with a plain oracle in `kvpool.core.oracles` or in the xxhash library.

Kernels work on arrays that the caller supplies, release the GIL and keep no state. `python -m kvpool.core.kernels`
compiles all of them into the cache.
"""
