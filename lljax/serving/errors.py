"""Errors of the API, as OpenAI writes them."""

from typing import Any

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that refuses a request. status: of HTTP. code: for programs, such as
    "model_not_found". param: the field of the body that is wrong.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": self.message,
            "type": TYPES.get(self.status, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def wrong(param: str | None, message: str, code: str | None = None) -> ApiError:
    """The error for a field that cannot be used; `message` continues the name of the field."""
    return ApiError(400, f"{param}: {message}" if param else message, code=code, param=param)


def too_long(prompt: int, tokens: int, longest: int, param: str, least: bool = False) -> ApiError:
    """A prompt and its completion exceed the context. least: the prompt has this many tokens or
    more.
    """
    return ApiError(
        400,
        f"This model's maximum context length is {longest} tokens, and the request takes "
        f"{'at least ' if least else ''}{prompt + tokens} ({prompt} in the prompt, {tokens} in the "
        "completion): shorten the prompt or ask for fewer tokens",
        code="context_length_exceeded",
        param=param,
    )


def stopping() -> ApiError:
    return ApiError(
        503, "the server is stopping", code="server_stopping", headers={"Retry-After": "5"}
    )
