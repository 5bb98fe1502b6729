"""POST /tokenize and POST /detokenize. Both work while the model still loads."""

from server.admission import check_ids
from server.chat import template_text
from server.routes.common import ServiceDep, off_loop
from server.routes.completions import token_text
from server.schemas.models import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from server.tokenizer import Tokenizer


async def tokenize(body: TokenizeRequest, service: ServiceDep) -> TokenizeResponse:
    """Token ids of a text or a conversation, exactly as a completion of it would start."""
    service.check_model(body.model)
    size = len(body.prompt or "") + sum(len(message.text) for message in body.messages or [])
    ids = await off_loop(size, lambda: _ids(body, service.tokenizer))
    ready = service.engine.ready
    return TokenizeResponse(
        tokens=ids,
        count=len(ids),
        max_model_len=ready.plan.max_model_len if ready else None,
        token_strs=[token_text(token, service.tokenizer) for token in ids] if body.return_token_strs else None,
    )


async def detokenize(body: DetokenizeRequest, service: ServiceDep) -> DetokenizeResponse:
    """The text of token ids."""
    service.check_model(body.model)
    if service.engine.ready is not None:
        check_ids(body.tokens, service.engine.ready.plan.vocab_size, "tokens")
    text = await off_loop(len(body.tokens), lambda: service.tokenizer.decode(body.tokens, body.skip_special_tokens))
    return DetokenizeResponse(prompt=text)


def _ids(body: TokenizeRequest, tokenizer: Tokenizer) -> list[int]:
    if body.prompt is not None:
        return tokenizer.encode(body.prompt, body.add_special_tokens)
    text = template_text(body.messages or [], tokenizer, add_generation_prompt=body.add_generation_prompt)
    return tokenizer.encode(text, add_special_tokens=False)
