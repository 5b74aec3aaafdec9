"""kvpool under vLLM: a KV connector that finds a prompt's blocks in the pool and stores what was computed.

vLLM loads it by name: `"kv_connector": "KVPoolConnector", "kv_connector_module_path": "engines.vllm.connector"`.
Only `connector`, `layout` and `stats` import vLLM; the rest is tested without it.
"""
