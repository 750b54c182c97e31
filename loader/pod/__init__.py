"""``podloader serve``: prepares the model, then supervises the engine that serves it."""
