"""POST /tokenize and POST /detokenize. Both work while the model still loads."""

from fastapi import Request

from engine.messages import PlanSummary
from server.admission import check_ids, check_length
from server.chat import template_text
from server.routes.common import ServiceDep, off_loop
from server.routes.completions import token_text
from server.schemas.models import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from server.tokenizer import Tokenizer


async def tokenize(body: TokenizeRequest, request: Request, service: ServiceDep) -> TokenizeResponse:
    """Token ids of a text or a conversation, exactly as a completion of it would start."""
    service.check_model(body.model)
    ready = service.engine.ready
    ids = await off_loop(request, lambda: _ids(body, service.tokenizer, ready.plan if ready else None))
    return TokenizeResponse(
        tokens=ids,
        count=len(ids),
        max_model_len=ready.plan.max_model_len if ready else None,
        token_strs=[token_text(token, service.tokenizer) for token in ids] if body.return_token_strs else None,
    )


async def detokenize(body: DetokenizeRequest, request: Request, service: ServiceDep) -> DetokenizeResponse:
    """The text of token ids."""
    service.check_model(body.model)
    if service.engine.ready is not None:
        check_ids(body.tokens, service.engine.ready.plan.vocab_size, "tokens")
    text = await off_loop(request, lambda: service.tokenizer.decode(body.tokens, body.skip_special_tokens))
    return DetokenizeResponse(prompt=text)


def _ids(body: TokenizeRequest, tokenizer: Tokenizer, plan: PlanSummary | None) -> list[int]:
    if body.prompt is not None:
        text, param, adds_special = body.prompt, "prompt", body.add_special_tokens
    else:
        options = {"add_generation_prompt": body.add_generation_prompt}
        text, param, adds_special = template_text(body.messages or [], tokenizer, **options), "messages", False
    if plan is not None:
        check_length(text, tokenizer, plan, param)
    return tokenizer.encode(text, adds_special)
