"""Asks a server what it is and how loaded it is, over HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from engines.openai_server.exposition import MetricsPage, read_page
from engines.openai_server.vllm_metrics import NAMES, STARTED, CacheFacts, cache_facts
from kvpool.core.errors import KvpoolError, Unauthenticated, Unavailable, Unsupported

#: A server under load may take its time for a page.
_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server says of itself. `started` tells one process of it from the next."""

    model: str
    tokenizer: str
    context_tokens: int
    version: str
    cache: CacheFacts
    started: float


class Refused(Unavailable):
    """Nothing listens there."""


class ServerPage:
    """One server's pages. Not for several threads at once."""

    def __init__(self, url: str, api_key: str = "") -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        # No proxy of the environment: servers are neighbours.
        self._client = httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT_S, trust_env=False)

    def close(self) -> None:
        self._client.close()

    def facts(self) -> ServerFacts:
        """Raises: Unavailable while it does not answer, Unsupported, Unauthenticated."""
        page = self.metrics()
        cache = cache_facts(page)
        listed = self._json("/v1/models").get("data")
        # Adapters are listed too, and name their base as parent.
        own = [entry for entry in listed or [] if isinstance(entry, dict) and not entry.get("parent")]
        if not own or not own[0].get("max_model_len"):
            raise Unsupported("it lists no model with a max_model_len", hint="is this vLLM?")
        return ServerFacts(
            model=str(own[0]["id"]),
            tokenizer=str(own[0].get("root") or own[0]["id"]),
            context_tokens=int(own[0]["max_model_len"]),
            version=str(self._json("/version").get("version", "")),
            cache=cache,
            started=page.value(STARTED),
        )

    def pool_mask(self, model: str, timeout_s: float) -> bytes:
        """What its connector mixes into the keys of blocks in the pool, 16 bytes; empty where it has none of ours.

        Asks with the shortest request there is: what the engine's own process knows is told nowhere else.
        Raises: as `facts`.
        """
        ask = {"kvpool_handoff": True}
        body = {"model": model, "prompt": [1], "max_tokens": 1, "temperature": 0, "kv_transfer_params": ask}
        told = self._json("/v1/completions", body, timeout_s).get("kv_transfer_params")
        value = told.get("kvpool_key_mask", "") if isinstance(told, dict) else ""
        try:
            return bytes.fromhex(value)
        except (TypeError, ValueError) as error:
            raise Unsupported(f"its connector tells of a key mask {value!r}") from error

    def metrics(self) -> MetricsPage:
        """Raises: as `facts`."""
        return read_page(self._call("/metrics").text, NAMES)

    def _json(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = _TIMEOUT_S) -> dict[str, Any]:
        try:
            value = self._call(path, body, timeout_s).json()
        except ValueError as error:
            raise Unsupported(f"{path} is no JSON") from error
        return value if isinstance(value, dict) else {}

    def _call(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = _TIMEOUT_S) -> httpx.Response:
        try:
            if body is None:
                response = self._client.get(path)
            else:
                response = self._client.post(path, json=body, timeout=timeout_s)
        except httpx.ConnectError as error:
            raise Refused(f"nothing listens at {self._client.base_url}: {error}") from error
        except httpx.HTTPError as error:
            raise Unavailable(f"{self._client.base_url} does not answer: {type(error).__name__} {error}") from error
        if response.status_code in (401, 403):
            raise Unauthenticated(f"{path} answers {response.status_code}", hint="--engine-api-key")
        if response.status_code != 200:
            kind: type[KvpoolError] = Unavailable if response.status_code >= 500 else Unsupported
            raise kind(f"{path} answers {response.status_code}")
        return response
