"""GET /v1/models."""

from server.routes.common import ServiceDep
from server.schemas.models import Model, ModelList
from server.service import Service


async def list_models(service: ServiceDep) -> ModelList:
    """The one model that is served."""
    return ModelList(data=[_model(service)])


async def get_model(model: str, service: ServiceDep) -> Model:
    """One model by name; 404 for others."""
    service.check_model(model)
    return _model(service)


def _model(service: Service) -> Model:
    ready = service.engine.ready
    if ready is None:
        return Model(id=service.served_name, created=service.started)
    plan = ready.plan
    return Model(
        id=service.served_name,
        created=service.started,
        max_model_len=plan.max_model_len,
        format=plan.format,
        architecture=plan.architecture,
        kv_policy=plan.kv_policy,
    )
