"""How requests are read: bodies no longer than --max-body-size, and strictly, so that everything behind has text that
can be encoded and numbers that are finite, and nothing that was sent is left out without a word."""

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from server.errors import BodyTooLarge, InvalidRequest

KEY_END = re.compile(rb'"\s*:')


class StrictRequest(Request):
    """A request whose JSON may hold no NaN, no half of a surrogate pair, no bottomless nesting, and no key twice."""

    async def body(self) -> bytes:
        """The whole body. Raises BodyTooLarge as soon as it is known to exceed the limit; the rest is never kept."""
        if not hasattr(self, "_body"):
            limit: int = self.app.state.service.config.max_body_size
            announced = self.headers.get("content-length", "0")
            if announced.isdecimal() and int(announced) > limit:
                raise BodyTooLarge(limit)
            body = bytearray()
            async for chunk in self.stream():
                body += chunk
                if len(body) > limit:
                    raise BodyTooLarge(limit)
            self._body = bytes(body)
        return self._body

    async def json(self) -> Any:
        """Raises JSONDecodeError, which FastAPI reports as a validation error."""
        try:
            content = from_json(await self.body(), allow_inf_nan=False)
            _refuse_repeated_keys(await self.body(), content)
            return content
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error


def _refuse_repeated_keys(body: bytes, content: object) -> None:
    """Raises ValueError naming a key that an object has twice: parsers drop the first without a word."""
    if isinstance(content, dict) and len(KEY_END.findall(body)) == len(content):
        return  # as in nearly every completion, and a second look at a long list of tokens takes long
    json.loads(body, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


class StrictRoute(APIRoute):
    """A route that reads its body as StrictRequest does, and refuses parameters of the query. Those for operators let
    them pass: balancers and monitors add some of their own."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            for name in () if "Operations" in self.tags else request.query_params:
                raise InvalidRequest(
                    f"?{name}: the address has no parameters here; fields are sent in a JSON body",
                    param=name,
                    code="unknown_field",
                )
            strict = StrictRequest(request.scope, request.receive)
            await strict.body()  # out here: FastAPI would report what it raises as a parsing error
            return await handle(strict)

        return handle_strictly
