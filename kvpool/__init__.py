"""kvpool: the KV cache of LLM serving as a resource of the whole cluster."""

__version__ = "0.1.0"
