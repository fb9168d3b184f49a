"""`/tokenize`, `/detokenize` and `/tokenizer_info`: the tokenizer for those who have not got it, in vLLM's forms."""

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from deepseek_jax.serving.server import schemas
from deepseek_jax.serving.server.body import read_fields, service_of
from deepseek_jax.serving.server.chat import prompt_of_messages
from deepseek_jax.serving.server.errors import bad
from deepseek_jax.serving.server.fields import Fields
from deepseek_jax.serving.server.prepare import off_loop
from deepseek_jax.serving.server.service import Served
from deepseek_jax.serving.server.wire import Json, answer


async def tokenize(http: HttpRequest) -> Response:
    """Ids of a prompt, or of a conversation's."""
    service = service_of(http)
    served = service.served
    async with read_fields(http) as fields:
        service.check_model(fields.text("model"))
        spelled = fields.flag("return_token_strs")
        if fields.get("messages") is not None:
            ids = (await prompt_of_messages(served, schemas.conversation(fields))).ids
        else:
            ids = await _ids(served, fields)
    more = {"token_strs": [served.tokenizer.token(i) for i in ids]} if spelled else {}
    return answer({"count": len(ids), "max_model_len": served.max_model_len, "tokens": ids, **more})


async def _ids(served: Served, fields: Fields) -> list[int]:
    special = fields.flag("add_special_tokens", True)
    text = fields.text("prompt")
    fields.needed("prompt")
    if special:
        return await off_loop(len(text), lambda: served.tokenizer.encode_prompt(text))
    return await off_loop(len(text), lambda: served.tokenizer.encode(text, allow_special=True))


async def detokenize(http: HttpRequest) -> Response:
    service = service_of(http)
    served = service.served
    async with read_fields(http) as fields:
        service.check_model(fields.text("model"))
        fields.needed("tokens")
        ids = fields.ids("tokens")
    if max(ids, default=0) >= served.vocab_size:
        raise bad(f"tokens has {max(ids)}: ids lie below vocab_size={served.vocab_size}", "tokens")
    return answer({"prompt": await off_loop(len(ids), lambda: served.tokenizer.decode(ids))})


async def tokenizer_info(http: HttpRequest) -> Response:
    served = service_of(http).served
    tokenizer = served.tokenizer
    info: Json = {
        "tokenizer_class": "deepseek_jax.data.Tokenizer",
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": served.max_model_len,
        **tokenizer.names,
        "chat_template": _template(served),
    }
    return answer(info)


def _template(served: Served) -> str | None:
    try:
        return served.tokenizer.chat_template.source
    except ValueError:
        return None
