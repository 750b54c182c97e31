"""Ray Serve LLM's hook: before it starts an engine, each node of its placement group prepares.

::

    llm_configs:
      - model_loading_config: {model_id: my-model}
        callback_config:
          callback_class: loader.nodes.serve_llm:PrepareOnNodes
          callback_kwargs: {config: /app/config.yaml}
"""

from __future__ import annotations

import asyncio

from ray.llm._internal.common.callbacks.base import CallbackBase

from loader.config.settings import Settings
from loader.errors import UnsupportedError
from loader.nodes.together import prepare_on_ray


class PrepareOnNodes(CallbackBase):  # type: ignore[misc]  # Ray tells no types
    """Has the engine serve what the Truss config named by ``config`` asks for.

    Secrets are looked up where the replica runs. Adapters are merged: Ray's ingress knows the
    model by one name.
    """

    async def on_before_node_init(self) -> None:
        """Prepare, and let Ray download nothing itself.

        Raises:
            LoaderError: as ``prepare_on_ray``; Ray puts its own words around it.
        """
        settings = Settings.load(self.kwargs["config"], overrides={"adapter_policy": "merge"})
        models = await asyncio.to_thread(
            prepare_on_ray, settings, placement_group=self.ctx.placement_group
        )
        ready = next(iter(models.values()))
        if ready.adapters:
            raise UnsupportedError(
                "several adapters for one model of Ray Serve LLM",
                got=", ".join(adapter.name for adapter in ready.adapters),
                next_step="choose one checkpoint, or give the others to its lora_config",
            )
        engine = self.llm_config.get_engine_config()
        engine.hf_model_id = str(ready.path)
        engine.engine_kwargs.setdefault("tokenizer", str(ready.tokenizer))
        self.ctx.run_init_node = False
