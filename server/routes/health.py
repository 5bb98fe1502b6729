"""GET /, GET /health, GET /ready and GET /metrics."""

from fastapi import Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from server.routes.common import ServiceDep


async def index(service: ServiceDep) -> dict[str, str]:
    """What this is, and where to read on."""
    return {
        "server": "nibble",
        "model": service.served_name,
        "api": "/v1",
        "docs": "/docs",
        "openapi": "/openapi.json",
    }


async def health(service: ServiceDep) -> JSONResponse:
    """Liveness: 200 while the process is of use, loading included; 503 once the engine has failed for good."""
    failed = service.engine.state == "failed"
    return JSONResponse(
        {"status": "failed" if failed else "ok", "engine": service.engine.state}, 503 if failed else 200
    )


async def ready(service: ServiceDep) -> JSONResponse:
    """Readiness: 200 when a request would be taken now; otherwise 503 with Retry-After and the reason."""
    plan = service.plan()
    return JSONResponse({"status": "ready", "model": service.served_name, "max_model_len": plan.max_model_len})


async def metrics(service: ServiceDep) -> Response:
    """What Prometheus scrapes."""
    return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
