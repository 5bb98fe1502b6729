"""Every error a client can see, with its HTTP status, and the one place where exceptions become responses.

    ApiError
    ├─ InvalidRequest          400  invalid_request_error   the caller's fault; `param` names the field
    │  ├─ ContextTooLong       400  context_length_exceeded
    │  ├─ BodyTooLarge         413  body_too_large
    │  └─ ModelNotFound        404  model_not_found
    ├─ Unauthorized            401  authentication_error    no API key, or one that is not known; WWW-Authenticate
    ├─ TooManyRequests         429  rate_limit_error        + Retry-After: the key's own limits
    ├─ Unavailable             503  server_unavailable      + Retry-After: loading, restarting, draining, queue full
    └─ EngineFailure           500  engine_error            the engine gave up on a request it had accepted

    engine.client.EngineUnavailable  -> Unavailable
    RequestValidationError (JSON, pydantic), TemplateError  -> InvalidRequest
    HTTPException of the router (404, 405)  -> its own status, same body
    anything else  -> 500, logged, without a word of it in the body

The body is OpenAI's: {"error": {"message", "type", "param", "code"}}.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from engine.client import EngineUnavailable
from engine.messages import Failed
from server.complaints import complaint, no_such_field

ROUTER_CODES = {404: "route_not_found", 405: "method_not_allowed"}


class ApiError(Exception):
    """An error with a status and a body in OpenAI's shape."""

    status = 500
    type = "server_error"
    code: str | None = "internal_error"

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    @property
    def headers(self) -> dict[str, str]:
        return {}

    @property
    def body(self) -> dict[str, Any]:
        return error_body(self.message, self.type, self.param, self.code)


class InvalidRequest(ApiError):
    """The request cannot be honoured as written."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextTooLong(InvalidRequest):
    """Prompt and answer do not fit the context or the KV cache."""

    code = "context_length_exceeded"


class BodyTooLarge(InvalidRequest):
    """The body exceeds --max-body-size."""

    status = 413
    code = "body_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The body is larger than the {limit:,} bytes this server takes (--max-body-size)")


class ModelNotFound(InvalidRequest):
    """The `model` field names something that is not served here."""

    status = 404
    code = "model_not_found"


class Unavailable(ApiError):
    """No new work now; `retry_after_s` says when to ask again."""

    status = 503
    type = "service_unavailable_error"
    code = "server_unavailable"

    def __init__(self, message: str, retry_after_s: float, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


class Unauthorized(ApiError):
    """No API key, or one that is not known."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class TooManyRequests(ApiError):
    """A key has used up what it may take; `retry_after_s` says when to ask again."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


class EngineFailure(ApiError):
    """The engine gave up on a request it had accepted."""

    code = "engine_error"


def error_body(message: str, type: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def from_failed(failed: Failed) -> ApiError:
    """The HTTP face of the engine's Failed."""
    if failed.kind == "invalid":
        return InvalidRequest(failed.message, param=failed.param)
    if failed.kind == "capacity":
        return ContextTooLong(failed.message, code="capacity_exceeded")
    return EngineFailure(failed.message)


def from_exception(error: Exception, body: type[BaseModel] | None = None) -> ApiError:
    """The ApiError to show for any exception. body: what was asked for, which knows the fields."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineUnavailable):
        return Unavailable(str(error), error.retry_after_s)
    if isinstance(error, RequestValidationError):
        return _from_validation(error, body)
    return ApiError("The server made an error while answering. It has been logged.")


def field_path(loc: Sequence[int | str]) -> str:
    """("messages", 0, "content") -> "messages[0].content"."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _from_validation(error: RequestValidationError, body: type[BaseModel] | None) -> ApiError:
    """The first complaint of pydantic, in one sentence that begins with the field."""
    first: Mapping[str, Any] = error.errors()[0]
    if first["type"] == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    loc = first["loc"][1:]  # it begins with "body", "query" or "path"
    path = field_path(loc)
    if not path and first["type"] == "value_error":
        return InvalidRequest(complaint(first))
    if not path:
        found = "; it is empty" if first["type"] == "missing" else ""
        return InvalidRequest(f"The body must be a JSON object with Content-Type: application/json{found}")
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"{path}: {no_such_field(body, loc)}", param=path, code="unknown_field")
    code = {"missing": "missing_field", "unsupported": "unsupported_field"}.get(first["type"])
    return InvalidRequest(f"{path}: {complaint(first)}", param=path, code=code)


async def _respond(request: Request, error: Exception) -> JSONResponse:
    field = getattr(request.scope.get("route"), "body_field", None)
    api_error = from_exception(error, None if field is None else field.field_info.annotation)
    request_id = getattr(request.state, "request_id", None)  # what failed unexpectedly passes by who adds it otherwise
    headers = api_error.headers | ({} if request_id is None else {"x-request-id": request_id})
    return JSONResponse(api_error.body, api_error.status, headers=headers)


async def _respond_to_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's number for a client that closed the connection


async def _respond_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    code = ROUTER_CODES.get(error.status_code, "invalid_request")
    body = error_body(message, "invalid_request_error", None, code)
    return JSONResponse(body, error.status_code, headers=error.headers)


def install(app: FastAPI) -> None:
    """Make every error of `app` leave in OpenAI's shape."""
    for kind in (ApiError, EngineUnavailable, RequestValidationError, Exception):
        app.add_exception_handler(kind, _respond)
    app.add_exception_handler(HTTPException, _respond_http)
    app.add_exception_handler(ClientDisconnect, _respond_to_nobody)
