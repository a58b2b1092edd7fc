"""The HTTP API: recommendations, feedback, health, metrics, and a page that describes them.

Routes only translate between HTTP and ``service``; whatever writes asks for the API key. The page loads
nothing from anywhere else.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import Depends, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from features.errors import BadInput, ProductError
from features.interactions import Interaction, InvalidInteraction, Kind, decode_interaction

from .batching import Overloaded
from .events import EventRecorder, NotRecorded
from .metrics import CONTENT_TYPE, ServerMetrics
from .service import NoPolicy, Recommender, Slate
from .settings import ServerSettings

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page.html")


class RecommendationRequest(BaseModel):
    """Who wants how many items."""

    model_config = ConfigDict(extra="forbid")

    user_id: Annotated[str, Field(min_length=1, max_length=256)]
    k: Annotated[int | None, Field(ge=1, description="Items wanted; the server's default when left out.")] = (
        None
    )


class RecommendedItem(BaseModel):
    """One place of the slate."""

    item_id: str
    position: Annotated[int, Field(description="1 is first.")]
    score: float
    source: Annotated[str, Field(description="policy, or popularity for a user without history.")]
    propensity: Annotated[float | None, Field(description="Only on sampled slates.")] = None


class RecommendationResponse(BaseModel):
    """One slate. Send ``request_id`` back with every impression and reaction."""

    request_id: str
    user_id: str
    policy_version: str
    sampled: bool
    degraded: Annotated[bool, Field(description="The user's features could not be read.")]
    items: list[RecommendedItem]


class FeedbackRequest(BaseModel):
    """Interactions as ``align3gr schema`` describes them."""

    model_config = ConfigDict(extra="forbid")

    interactions: Annotated[list[dict[str, Any]], Field(min_length=1)]


class RefusedInteraction(BaseModel):
    """One interaction that was not taken."""

    index: Annotated[int, Field(description="Its place in the request, from 0.")]
    reason: str
    message: str


class FeedbackResponse(BaseModel):
    """What became of a feedback request: accepted ones are in Kafka."""

    accepted: int
    refused: list[RefusedInteraction]


class Health(BaseModel):
    """What works. ``ready`` once a policy serves."""

    ready: bool
    policy_version: str | None
    reference: str | None
    canary: Annotated[str | None, Field(description="Serves a share of users beside policy_version.")]
    canary_share: float | None
    policy_error: str | None
    features_error: str | None
    catalogue_error: str | None
    kafka_error: str | None
    events_waiting: int
    uptime_seconds: float


def create_app(
    service: Recommender,
    settings: ServerSettings,
    metrics: ServerMetrics,
    *,
    publish: EventRecorder | None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> FastAPI:
    """The ASGI application around a ``service``; ``publish`` None (no Kafka) refuses feedback."""
    started = time.monotonic()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="align3gr", version=version("align3gr"), lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Recommendations from the promoted policy, and the feedback it learns from.",
    )  # fmt: skip
    app.middleware("http")(_measured(metrics))
    app.add_exception_handler(ProductError, _one_line)

    def writer(
        key: Annotated[str | None, Header(alias="X-API-Key")] = None,
        authorization: Annotated[str | None, Header()] = None,
    ) -> None:
        _require_key(settings, key or _bearer(authorization))

    def reader(
        key: Annotated[str | None, Header(alias="X-API-Key")] = None,
        authorization: Annotated[str | None, Header()] = None,
    ) -> None:
        if settings.key_for_reads:
            _require_key(settings, key or _bearer(authorization))

    async def recommended(user_id: str, k: int | None) -> RecommendationResponse:
        wanted = settings.k if k is None else k
        if wanted > settings.max_k:
            raise HTTPException(422, f"k is {wanted}; this server gives at most {settings.max_k}")
        return _response(await service.recommend(user_id, wanted))

    @app.get("/recommendations", dependencies=[Depends(reader)])
    async def get_recommendations(
        user_id: Annotated[str, Query(min_length=1, max_length=256)],
        k: Annotated[int | None, Query(ge=1)] = None,
    ) -> RecommendationResponse:
        """k items for a user, best first."""
        return await recommended(user_id, k)

    @app.post("/recommendations", dependencies=[Depends(reader)])
    async def post_recommendations(body: RecommendationRequest) -> RecommendationResponse:
        """k items for a user, best first."""
        return await recommended(body.user_id, body.k)

    @app.post("/feedback", status_code=202, dependencies=[Depends(writer)])
    async def post_feedback(body: FeedbackRequest, response: Response) -> FeedbackResponse:
        """Take what users did; answered when Kafka has acknowledged it. Sending again is safe."""
        if len(body.interactions) > settings.feedback_batch:
            raise HTTPException(413, f"at most {settings.feedback_batch} interactions in one request")
        accepted, refused = decode_batch(body.interactions, now())
        metrics.feedback.labels("refused").inc(len(refused))
        if not accepted:
            response.status_code = 422
            return FeedbackResponse(accepted=0, refused=refused)
        if publish is None:
            raise NotRecorded("this server was started without Kafka; post to another one")
        await _acknowledged(publish, accepted, settings.feedback_timeout_seconds)
        metrics.feedback.labels("accepted").inc(len(accepted))
        return FeedbackResponse(accepted=len(accepted), refused=refused)

    def health_now() -> Health:
        state = service.swap.state()
        return Health(
            ready=state.serving is not None,
            policy_version=state.serving,
            reference=state.reference,
            canary=state.canary,
            canary_share=state.canary_share,
            policy_error=state.error,
            features_error=service.features_error,
            catalogue_error=service.eligible.error,
            kafka_error=publish.error if publish else None,
            events_waiting=publish.waiting if publish else 0,
            uptime_seconds=round(time.monotonic() - started, 1),
        )

    @app.get("/health")
    async def health() -> Health:
        """What works and what does not; always 200 while the process answers."""
        return health_now()

    @app.get("/health/live")
    async def live() -> dict[str, bool]:
        """The process answers."""
        return {"live": True}

    @app.get("/health/ready")
    async def ready(response: Response) -> Health:
        """200 once a policy serves, 503 before."""
        facts = health_now()
        response.status_code = 200 if facts.ready else 503
        return facts

    @app.get("/metrics", include_in_schema=False)
    async def exposition() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    return app


def decode_batch(
    raw: Sequence[dict[str, Any]], now: datetime
) -> tuple[list[Interaction], list[RefusedInteraction]]:
    """What of a feedback request can be taken, and what cannot and why; ``served`` only the server writes."""
    accepted: list[Interaction] = []
    refused: list[RefusedInteraction] = []
    for index, fields in enumerate(raw):
        try:
            interaction = decode_interaction(msgspec.json.encode(fields), now=now)
        except InvalidInteraction as error:
            refused.append(RefusedInteraction(index=index, reason=error.reason, message=str(error)))
            continue
        if interaction.kind is Kind.SERVED:
            message = "served is written by the server; post what the user saw as impression"
            refused.append(RefusedInteraction(index=index, reason="not_yours", message=message))
            continue
        accepted.append(interaction)
    return accepted, refused


async def _acknowledged(publish: EventRecorder, interactions: list[Interaction], seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await asyncio.wrap_future(publish.publish(interactions))
    except TimeoutError as error:
        raise NotRecorded(
            f"Kafka did not acknowledge within {seconds:g} s; send it again with the same event_ids"
        ) from error


def _response(slate: Slate) -> RecommendationResponse:
    return RecommendationResponse(
        request_id=slate.request_id,
        user_id=slate.user_id,
        policy_version=slate.policy_version,
        sampled=slate.sampled,
        degraded=slate.degraded,
        items=[
            RecommendedItem(
                item_id=item.item_id,
                position=item.position,
                score=item.score,
                source=item.source,
                propensity=item.propensity,
            )
            for item in slate.items
        ],
    )


def _require_key(settings: ServerSettings, given: str | None) -> None:
    if settings.api_key is None:
        raise HTTPException(403, "this server has no API key, so nothing may be written; set server.api_key")
    wanted = settings.api_key.get_secret_value().encode()
    if given is None or not hmac.compare_digest(given.encode(), wanted):
        raise HTTPException(401, "send the API key in the header X-API-Key", {"WWW-Authenticate": "Bearer"})


def _bearer(authorization: str | None) -> str | None:
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


async def _one_line(_: Request, error: Exception) -> JSONResponse:
    """A product error as a status: what may pass is 503 with a hint to retry, bad input is 422."""
    if isinstance(error, NoPolicy | Overloaded | NotRecorded):
        return JSONResponse({"detail": str(error)}, 503, headers={"Retry-After": "1"})
    return JSONResponse({"detail": str(error)}, 422 if isinstance(error, BadInput) else 500)


def _measured(
    metrics: ServerMetrics,
) -> Callable[[Request, Callable[[Request], Awaitable[Response]]], Awaitable[Response]]:
    async def measure(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        started = time.perf_counter()
        status = 500
        try:
            response = await answer(request)
            status = response.status_code
            return response
        finally:
            route = request.scope.get("route")
            endpoint = getattr(route, "path", "unknown")
            metrics.requests.labels(endpoint, str(status)).inc()
            metrics.latency.labels(endpoint).observe(time.perf_counter() - started)

    return measure
