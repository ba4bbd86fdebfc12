"""An answer that takes a while: it enters the house, works, and leaves, in one coroutine, so that
whatever happens (a client that goes away, a timeout, an error, the server's end) all it holds is
given back."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable, Mapping
from enum import Enum

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quantflow.errors import RequestError, ResourceError
from quantflow.serve.errors import Refused, aborted, engine_stopped, refused
from quantflow.serve.service import Service
from quantflow.serve.wire import Json


class Begun(Enum):
    """What of an answer is on its way."""

    nothing, object, events = range(3)


class Watched(Response):
    """sequences: how many places it takes. renamed: what the client calls the engine's
    arguments."""

    def __init__(
        self, service: Service, sequences: int, renamed: Mapping[str, str] | None = None
    ) -> None:
        self.service, self.sequences, self.renamed = service, sequences, renamed
        self.status_code, self.background = 200, None
        self._begun = Begun.nothing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work, gone = (
            asyncio.create_task(self._answer(scope, receive, send)),
            asyncio.create_task(_gone(receive)),
        )
        expired = asyncio.create_task(self.service.expired.wait())
        tasks = (work, gone, expired)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            elif not gone.done():
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                await self._fail(send, aborted())
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self.service.config.request_timeout_s
        try:
            async with asyncio.timeout(limit):
                with self.service.entered(self.sequences):
                    await self._run(scope, receive, send)
        except TimeoutError:
            await self._fail(
                send, Refused(504, f"the answer took more than {limit:g} s", code="timeout")
            )
        except (ClientDisconnect, ConnectionError):
            return
        except Refused as error:
            await self._fail(send, error)
        except RequestError as error:
            await self._fail(send, refused(error.problems, self.renamed))
        except ResourceError:
            await self._fail(send, engine_stopped())

    @abstractmethod
    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Works, notes what has begun, and sends. Raises Refused, RequestError, ResourceError."""

    async def _fail(self, send: Send, error: Refused) -> None:
        """What has begun can only be cut short."""
        if self._begun == Begun.nothing:
            raise error

    async def _send(self, content: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """All in one. content: JSON."""
        self._begun = Begun.object
        await Response(content, media_type=Json.media_type)(scope, receive, send)


class Worked(Watched):
    """JSON that comes of work beside the loop, and not of the engine's. Where the client goes away
    before it is done, it is not begun, or ended where it can be: see `Service.prepare`."""

    def __init__(self, service: Service, work: Callable[[], bytes]) -> None:
        super().__init__(service, 1)
        self._work: Callable[[], bytes] | None = work

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        work, self._work = self._work, None
        assert work
        await self._send(await self.service.prepare_aside(work), scope, receive, send)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
