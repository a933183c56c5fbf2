"""The HTTP API and the page: routes to the studio, in front of them a token and bounds, behind them typed errors."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import reprlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Header, HTTPException, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bld_core.errors import UserError
from cluster.studio.api import (
    BusyError,
    Failure,
    Fault,
    InpaintingsRequest,
    InterpolationsRequest,
    Model,
    OutpaintingsRequest,
    Pictures,
    Reconstruction,
    ReconstructionRequest,
    RequestError,
    SamplesRequest,
    Step,
)
from cluster.studio.engine import Answer, AnyRequest, Studio
from cluster.studio.reference import reference

_STATIC = Path(__file__).with_name("static")
_POLICY = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'"
_READY_S = 5
_CLOSED = ("/v1/", "/report")
Accept = Annotated[str, Header(include_in_schema=False)]


def digest(token: str) -> str:
    """What is kept of a token: nothing that it could be read from; "" for none."""
    return hashlib.sha256(token.strip().encode()).hexdigest() if token.strip() else ""


def make_app(studio: Studio, body_mb: int, token: str = "") -> FastAPI:
    """The API and the page, as an ASGI app.

    Args:
        studio: what answers.
        body_mb: largest request in MiB.
        token: `digest` of the bearer token that is asked for; "" asks for none.
    """
    refused: dict[int | str, dict[str, Any]] = {code: {"model": Failure} for code in (401, 413, 422, 503)}
    app = FastAPI(title="Binary Latent Diffusion", version="1", responses=refused, docs_url=None, redoc_url=None)
    app.add_middleware(Bounds, most=body_mb << 20, token=token)
    app.mount("/static", Static(directory=_STATIC), name="static")
    _add_errors(app)
    _add_pages(app, studio)

    @app.get("/v1/model")
    async def model(response: Response) -> Model:
        """What is served: its classes, sizes, hashes, evaluation."""
        made = await studio.model()
        response.headers.update(_made_by(made.version))
        return made

    @app.post("/v1/samples", response_model=Pictures)
    async def samples(request: SamplesRequest, accept: Accept = "") -> Response:
        """New images."""
        return await _answer(studio, request, accept)

    @app.post("/v1/samples/stream", response_model=Step)
    async def stream(request: SamplesRequest) -> Response:
        """New images while they are drawn: server-sent events `step`, and at the end `done`, as /v1/samples."""
        events = aiter(studio.watch(request))
        first = await anext(events)  # errors have their status
        return StreamingResponse(
            _events(first, events), media_type="text/event-stream", headers=_made_by(first.version)
        )

    @app.post("/v1/inpaintings", response_model=Pictures)
    async def inpaintings(request: InpaintingsRequest, accept: Accept = "") -> Response:
        """Completions of an image of which a part is made anew."""
        return await _answer(studio, request, accept)

    @app.post("/v1/outpaintings", response_model=Pictures)
    async def outpaintings(request: OutpaintingsRequest, accept: Accept = "") -> Response:
        """An image made smaller, with new surroundings."""
        return await _answer(studio, request, accept)

    @app.post("/v1/reconstructions", response_model=Reconstruction)
    async def reconstructions(request: ReconstructionRequest, accept: Accept = "") -> Response:
        """An image's bits, and what is left of it; or what bits mean."""
        return await _answer(studio, request, accept)

    @app.post("/v1/interpolations", response_model=Pictures)
    async def interpolations(request: InterpolationsRequest, accept: Accept = "") -> Response:
        """Images between two, through the bits."""
        return await _answer(studio, request, accept)

    return app


def _add_pages(app: FastAPI, studio: Studio) -> None:
    """What is no part of the API: the page, the report, and whether the server lives."""

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(
            _STATIC / "index.html", headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
        )

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(reference(app))

    @app.get("/report", include_in_schema=False)
    async def report() -> Response:
        text = await studio.report()
        headers = {"Content-Security-Policy": "sandbox"}  # it comes with the model, and has no scripts
        return HTMLResponse(text, headers=headers) if text else HTMLResponse("This model has no report.", 404)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the server lives."""
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        """Whether it answers requests."""
        try:
            async with asyncio.timeout(_READY_S):
                return {"status": "ready", "version": (await studio.model()).version}
        except TimeoutError as error:
            raise BusyError(_READY_S) from error


async def _answer(studio: Studio, request: AnyRequest, accept: str) -> Response:
    """The answer as JSON, or the one picture that was asked for as PNG."""
    made = await studio.answer(request)
    headers = _made_by(made.version)
    if "image/png" in accept:
        shown = [made.png] if isinstance(made, Reconstruction) else [each.png for each in made.images]
        if len(shown) != 1:
            raise RequestError("count", str(len(shown)), "1 where image/png is accepted", "accept application/json")
        return Response(base64.b64decode(shown[0]), media_type="image/png", headers=headers)
    return Response(made.model_dump_json(), media_type="application/json", headers=headers)


def _made_by(version: str) -> dict[str, str]:
    return {"X-Model-Version": version, "Cache-Control": "no-store"}


async def _events(first: Step | Answer, events: AsyncIterator[Step | Pictures]) -> AsyncIterator[str]:
    """Server-sent events; an error that comes later is one of them."""
    yield _event("step" if isinstance(first, Step) else "done", first.model_dump_json())
    try:
        async for each in events:
            yield _event("step" if isinstance(each, Step) else "done", each.model_dump_json())
    except UserError as error:
        yield _event("error", _failure(error).model_dump_json())


def _event(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}\n\n"


def _failure(error: UserError) -> Failure:
    """An error in the form that the API gives it."""
    parts = (
        {"field": error.field, "value": error.value, "bound": error.bound, "remedy": error.remedy}
        if isinstance(error, RequestError)
        else {}
    )
    return Failure(error=Fault(message=str(error).replace("`", ""), **parts))


def _add_errors(app: FastAPI) -> None:
    """Errors as `Failure`, with a status that says whose fault it is."""

    async def refused(_: object, error: Exception) -> Response:
        assert isinstance(error, UserError)
        if isinstance(error, BusyError):
            return JSONResponse(_failure(error).model_dump(), 503, {"Retry-After": str(error.seconds)})
        return JSONResponse(_failure(error).model_dump(), 422)

    async def malformed(_: object, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        own = first.get("ctx", {}).get("error")
        if not isinstance(own, RequestError):
            field = ".".join(str(part) for part in first["loc"] if part != "body")
            value = "missing" if first["type"] == "missing" else reprlib.repr(first.get("input"))
            own = RequestError(
                field or "the body",
                value,
                first["msg"].removeprefix("Input should be "),
                message=f"{field or 'the body'}: {first['msg']}",
            )
        return JSONResponse(_failure(own).model_dump(), 422)

    async def other(_: object, error: Exception) -> Response:
        assert isinstance(error, AnyHTTPException)
        failure = Failure(error=Fault(message=str(error.detail)))
        return JSONResponse(failure.model_dump(), error.status_code, error.headers)

    app.add_exception_handler(UserError, refused)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(AnyHTTPException, other)


class Static(StaticFiles):
    """Files of the page, which a browser asks for again each time: those of another release would not fit the page."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        """Called by Starlette; where the file is the one that the browser has, the answer has no body."""
        answer = super().file_response(*args, **options)
        answer.headers["Cache-Control"] = "no-cache"
        return answer


class Bounds:
    """In front of the app: who has no token is sent away, and a body that is too large, before it is read.

    Args:
        app: behind it.
        most: bytes of a body.
        token: digest of the token that is asked for; "" asks for none.
    """

    def __init__(self, app: ASGIApp, most: int, token: str) -> None:
        self.app, self.most, self.token = app, most, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self.token and path.startswith(_CLOSED) and not self._known(headers.get(b"authorization", b"")):
            fault = Fault(
                message="a bearer token is asked for: send Authorization: Bearer <token>", field="Authorization"
            )
            answer = JSONResponse(Failure(error=fault).model_dump(), 401, {"WWW-Authenticate": "Bearer"})
            return await answer(scope, receive, send)
        length = headers.get(b"content-length", b"0")
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:
                raise HTTPException(413, self._too_large)
            return message

        if length.isdigit() and int(length) > self.most:
            return await JSONResponse(Failure(error=Fault(message=self._too_large)).model_dump(), 413)(
                scope, receive, send
            )
        return await self.app(scope, bounded, send)

    @property
    def _too_large(self) -> str:
        return f"the body is too large; it must be at most {self.most >> 20} MiB: send a smaller picture"

    def _known(self, header: bytes) -> bool:
        """Whether a header holds the token; in a time that does not tell how much of it is right."""
        kind, _, token = header.partition(b" ")
        given = hashlib.sha256(token.strip()).hexdigest()
        return kind.lower() == b"bearer" and hmac.compare_digest(given, self.token)
