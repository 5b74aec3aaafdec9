"""Requests to engines that speak the OpenAI API themselves (vLLM): placed like any other, and passed on over HTTP.

What the client wrote is passed on as it is, and so is the answer: the gateway adds where the request goes, what hands a
prompt's KV from one server to the other, and what happens when a server is lost. `asks`, `answers`, `sse` are pure.
"""
