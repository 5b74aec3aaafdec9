"""Errors as OpenAI's clients know them: one JSON shape, one table from our reasons to HTTP."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.responses import Response

from kvpool.core.errors import Reason
from scheduler.gateway.events import Failure, FailureKind


class ApiError(Exception):
    """An answer that is an error. `code` is for programs, `param` names the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_ms: int = 0,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after_ms = retry_after_ms

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = {"retry-after": str(max(1, math.ceil(self.retry_after_ms / 1000)))} if self.retry_after_ms else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Response(json.dumps(self.body()), self.status, headers, media_type="application/json")


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def model_not_found(model: str) -> ApiError:
    return ApiError(404, f"The model {model!r} does not exist.", param="model", code="model_not_found")


def context_exceeded(prompt_tokens: int, max_tokens: int, context_tokens_max: int, param: str) -> ApiError:
    return bad_request(
        f"This model's maximum context length is {context_tokens_max} tokens, but {prompt_tokens} tokens in the "
        f"prompt and {max_tokens} for the answer were asked for.",
        param,
        "context_length_exceeded",
    )


def overloaded(message: str, retry_after_ms: int = 1_000) -> ApiError:
    return ApiError(
        429, message, kind="rate_limit_error", code="overloaded", retry_after_ms=max(1, retry_after_ms or 1_000)
    )


def unavailable(message: str, code: str = "unavailable", retry_after_ms: int = 1_000) -> ApiError:
    return ApiError(
        503, message, kind="service_unavailable_error", code=code, retry_after_ms=max(1, retry_after_ms or 1_000)
    )


#: Refusals: HTTP status, OpenAI's error type, code, and whether to come back.
_REFUSALS: dict[Reason, tuple[int, str, str, bool]] = {
    Reason.NO_CAPACITY: (429, "rate_limit_error", "no_capacity", True),
    Reason.OVERLOADED: (429, "rate_limit_error", "overloaded", True),
    Reason.SLO_UNREACHABLE: (429, "rate_limit_error", "slo_unreachable", True),
    Reason.NO_INSTANCE: (503, "service_unavailable_error", "no_instance", True),
    Reason.UNKNOWN_MODEL: (404, "invalid_request_error", "model_not_found", False),
    Reason.CONTEXT_TOO_LONG: (400, "invalid_request_error", "context_length_exceeded", False),
    Reason.BAD_ARGUMENT: (400, "invalid_request_error", "invalid_value", False),
}


def from_failure(failure: Failure) -> ApiError:
    """The answer to a request that ended without one."""
    if failure.kind is FailureKind.REFUSED:
        reason = failure.reason or Reason.OVERLOADED
        status, kind, code, again = _REFUSALS.get(reason, (500, "server_error", reason.name.lower(), False))
        wait_ms = max(1, failure.retry_after_ms or 1_000) if again else 0
        return ApiError(status, failure.message, kind=kind, code=code, retry_after_ms=wait_ms)
    if failure.kind is FailureKind.UNREACHABLE:
        return unavailable(failure.message, "scheduler_unreachable")
    if failure.kind is FailureKind.STOPPING:
        return unavailable(failure.message, "stopping")
    if failure.kind is FailureKind.DEADLINE:
        return ApiError(504, failure.message, kind="timeout_error", code="deadline")
    code = "internal" if failure.kind is FailureKind.GATEWAY else "engine_error"
    return ApiError(500, failure.message, kind="server_error", code=code)
