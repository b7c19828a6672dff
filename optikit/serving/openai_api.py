"""OpenAI's completions and chat completions: what a request may say, and the shapes of answers.

A parameter that this server doesn't have is refused by name, never ignored: an answer that obeys half of a request is
a wrong answer. Parameters of vLLM that clients and load generators use are known too: `ignore_eos`, `top_k`,
`repetition_penalty`, `return_token_ids`, `return_tokens_as_token_ids`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from optikit.errors import UsageError

MOST_STOPS = 16
MOST_CHOICES = 128
MOST_LOGPROBS = 20
MOST_PROMPTS = 2048
DEFAULT_NEW_TOKENS = 16
"""Of a completion; an answer of a chat may fill the context."""
IDLE = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
"""Parameters that change no answer here."""

Stops = Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=MOST_STOPS)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


Several = Field(min_length=1, max_length=MOST_PROMPTS)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream tells beside text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Sampled(_Strict):
    """What both kinds of requests may say."""

    model: str = ""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stop: Stops = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]] = {}
    ignore_eos: bool = False
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, given: Any) -> Any:
        """Leave out what is null or idle; make a list of one stop string."""
        if not isinstance(given, dict):
            return given
        kept = {key: value for key, value in given.items() if value is not None and key not in IDLE}
        if isinstance(kept.get("stop"), str):
            kept["stop"] = [kept["stop"]]
        if kept.get("best_of") == kept.get("n", 1):
            kept.pop("best_of", None)
        return kept

    @property
    def new_tokens(self) -> int | None:
        """Most tokens of an answer; None is as many as fit."""
        raise NotImplementedError

    @property
    def told(self) -> int | None:
        """How many likeliest tokens are told with each token's log-probability; None tells none."""
        raise NotImplementedError


class Completion(Sampled):
    """`POST /v1/completions`."""

    prompt: str | Ids | Annotated[list[str], Several] | Annotated[list[Ids], Several]
    max_tokens: Annotated[int, Field(ge=0)] = DEFAULT_NEW_TOKENS
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def new_tokens(self) -> int:
        """Most tokens of an answer."""
        return self.max_tokens

    @property
    def told(self) -> int | None:
        """How many likeliest tokens are told."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, texts or tokens."""
        several = isinstance(self.prompt, list) and not (self.prompt and isinstance(self.prompt[0], int))
        return list(self.prompt) if several else [self.prompt]  # type: ignore[arg-type,list-item]  # by the line above


class Part(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a chat; templates may read further fields."""

    model_config = ConfigDict(extra="allow", frozen=True)

    role: Annotated[str, Field(min_length=1)]
    content: str | list[Part] = ""

    def turn(self) -> dict[str, Any]:
        """Return it as templates read it, its parts joined."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {**(self.model_extra or {}), "role": self.role, "content": text}


class ResponseFormat(_Strict):
    """Of an answer: nothing but text."""

    type: Literal["text"]


class Chat(Sampled):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] = 0
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] = []
    tool_choice: Literal["none", "auto"] = "none"

    @property
    def new_tokens(self) -> int | None:
        """Most tokens of an answer; None is as many as fit."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def told(self) -> int | None:
        """How many likeliest tokens are told."""
        return self.top_logprobs if self.logprobs else None


Kind = TypeVar("Kind", bound=Sampled)


def read(kind: type[Kind], body: bytes) -> Kind:
    """Return a request.

    Raises:
        UsageError: It isn't JSON, or says what this server doesn't do; the first fault is named, with its value.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(each) for each in first["loc"]) or "the body"
        if first["type"] == "extra_forbidden":
            raise UsageError(f"this server has no parameter {where!r}", fix="leave it out") from None
        given = repr(first["input"])[:100]
        raise UsageError(f"{where}: {first['msg']}, not {given}", fix="see OpenAI's API reference") from None
    except RecursionError:
        raise UsageError("the body is nested too deeply", fix="see OpenAI's API reference") from None
