"""Request bodies of the OpenAI API, as far as they are served, and the extensions of vLLM and kvpool."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from scheduler.gateway.errors import bad_request

STOPS_MAX = 4
_UINT32_MAX = 2**32 - 1


def _encodable(text: str) -> str:
    """JSON can spell half a surrogate pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode text") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
StopText = Annotated[Text, Field(min_length=1, max_length=1024)]


class _Strict(BaseModel):
    """Numbers are numbers and flags are flags; unknown fields are ignored, as OpenAI's clients expect."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class KvpoolOptions(_Strict):
    """`"kvpool": {...}` in a body. Unknown names are refused: a typo must not change a measurement."""

    model_config = ConfigDict(strict=True, extra="forbid")

    policy: Annotated[str, Field(max_length=64, pattern=r"^[a-z0-9_]*$")] = ""
    use_pool: bool = True
    session: Annotated[Text, Field(max_length=256)] = ""
    return_token_ids: bool = False
    top2_gaps: bool = False
    #: Higher goes first while requests wait for a place.
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    #: Latency objectives of this request; 0 = none; left out = the gateway's own.
    ttft_slo_ms: Annotated[int, Field(ge=0, le=3_600_000)] | None = None
    tpot_slo_ms: Annotated[int, Field(ge=0, le=3_600_000)] | None = None


class StreamOptions(_Strict):
    include_usage: bool = False


class ResponseFormat(_Strict):
    type: str = "text"


#: Fields of the API that are not served, each with the values that ask for nothing.
_NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "prompt_logprobs": (None, 0),
    "top_k": (None, 0, -1),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "repetition_penalty": (None, 1),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "structured_outputs": (None,),
}


class _Request(_Strict):
    """What completions and chat have in common."""

    model: str
    max_tokens: Annotated[int, Field(ge=1, le=_UINT32_MAX)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=STOPS_MAX)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, le=_UINT32_MAX)]], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    cache_salt: Annotated[Text, Field(max_length=1024)] | None = None
    return_token_ids: bool | None = None
    kvpool: KvpoolOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_served(cls, data: Any) -> Any:
        for field, neutral in _NOT_SERVED.items():
            if data.get(field) not in neutral:
                raise bad_request(f"{field!r} is not supported.", field, "unsupported_parameter")
        return data

    @model_validator(mode="after")
    def _refuse_values_that_are_not_served(self) -> _Request:
        if (self.n or 1) != 1:
            raise bad_request("Only n=1 is supported.", "n", "unsupported_value")
        if self.response_format is not None and self.response_format.type != "text":
            raise bad_request("Only the response format 'text' is supported.", "response_format", "unsupported_value")
        if self.stream_options is not None and not self.stream:
            raise bad_request("'stream_options' is only allowed with stream=true.", "stream_options")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def options(self) -> KvpoolOptions:
        return self.kvpool or KvpoolOptions()

    @property
    def wants_token_ids(self) -> bool:
        return bool(self.return_token_ids) or self.options.return_token_ids

    @property
    def wants_usage_chunk(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Request):
    """POST /v1/completions. The prompt's form is checked with the tokenizer, in `prompts`."""

    prompt: Any
    #: 1: the chosen token's log probability; alternatives are not served.
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = None

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None


class TextPart(_Strict):
    type: Literal["text"]
    text: Text


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart] | None = None

    @model_validator(mode="after")
    def _needs_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("content is required")
        return self

    def plain(self) -> dict[str, str]:
        """As chat templates take it. Parts are joined by line breaks, as vLLM does."""
        content = self.content or ""
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_UINT32_MAX)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)

    @property
    def tokens_asked(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


AnyRequest = TypeVar("AnyRequest", CompletionRequest, ChatRequest)


def parse(kind: type[AnyRequest], data: Any) -> AnyRequest:
    """The request in a body. Raises: ApiError (400) that names the field."""
    if not isinstance(data, dict):
        raise bad_request("The body must be a JSON object.")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        # The deepest complaint is the one about what the client meant, where a field may have several forms.
        first = max(error.errors(include_url=False, include_context=False), key=lambda e: len(e["loc"]))
        path = [str(part) for part in first["loc"] if not _names_a_type(part)]
        param = ".".join(path) or None
        raise bad_request(f"{param or 'body'}: {first['msg']}", param, "invalid_value") from None


def _names_a_type(part: int | str) -> bool:
    """Pydantic adds the form that it tried to the path."""
    return isinstance(part, str) and ("[" in part or part in {"str", "function-after", "constrained-str"})
