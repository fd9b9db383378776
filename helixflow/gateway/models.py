"""GET /v1/models and GET /v1/models/{id}."""

from typing import Any

import orjson

from helixflow.core_rs import ModelNotFound, Unavailable
from helixflow.gateway.bridge import Bridge
from helixflow.gateway.http import Request
from helixflow.refusals import refusal

PREFIX = "/v1/models/"
OWNER = "helixflow"


class Models:
    """The models of the pools that are ready now; an alias is listed as a model of its own."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    def _named(self) -> dict[str, dict[str, Any]]:
        return {
            name: {
                "id": name,
                "object": "model",
                "created": model.created,
                "owned_by": OWNER,
                "max_model_len": model.max_model_len,  # as vLLM names it
                "context_length": model.max_model_len,  # as OpenRouter does
            }
            for model in self._bridge.models()
            for name in (model.id, *model.aliases)
        }

    async def index(self, request: Request) -> None:
        """Every model, sorted by name."""
        named = self._named()
        data = [named[name] for name in sorted(named)]
        await request.respond(200, orjson.dumps({"object": "list", "data": data}))

    async def show(self, request: Request) -> None:
        """One model. Raises ModelNotFound; Unavailable while no pool is ready, because then nobody knows."""
        name = request.path.removeprefix(PREFIX)
        named = self._named()
        name = name if name in named else name.strip("/")
        if not named:
            raise refusal(Unavailable, "no inference pool is ready; try again shortly")
        if name not in named:
            raise refusal(
                ModelNotFound, f"the model {name[:200]!r} does not exist; GET /v1/models lists the models", "model"
            )
        await request.respond(200, orjson.dumps(named[name]))
