"""Inference servers that run by themselves (vLLM, over its OpenAI HTTP API) as instances of a kvpool cluster.

An agent beside the servers joins the scheduler in their place: what they are, how loaded, which blocks their own caches
hold. Nothing here imports an engine; requests go straight from the gateway to the servers.
"""
