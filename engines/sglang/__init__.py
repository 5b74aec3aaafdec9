"""kvpool under SGLang: a storage backend of HiCache that keeps the host pool's pages in the pool.

SGLang loads it by name: `--hicache-storage-backend dynamic` with `"module_path": "engines.sglang.backend"` and
`"class_name": "KVPoolHiCacheStorage"` in the extra config. Only `backend`, `identity` and `stats` import SGLang; the
rest is plain and is tested without it.
"""
