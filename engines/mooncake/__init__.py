"""Mooncake Store's Python API on kvpool: for code written for `mooncake.store` that is to run on this pool unchanged.

`python -m engines.mooncake path` prints the folder to put first on PYTHONPATH; docs/migrating-from-mooncake.md.
"""
