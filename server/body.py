"""How bodies are read: no more than --max-body-size, and strictly, so that everything behind has text that can be
encoded and numbers that are finite."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from server.errors import BodyTooLarge


class StrictRequest(Request):
    """A request whose JSON may hold no NaN, no half of a surrogate pair, and no bottomless nesting."""

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
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error


class StrictRoute(APIRoute):
    """A route that reads its body as StrictRequest does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            strict = StrictRequest(request.scope, request.receive)
            await strict.body()  # out here: FastAPI would report what it raises as a parsing error
            return await handle(strict)

        return handle_strictly
