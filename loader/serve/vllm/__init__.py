"""vLLM: the only room that speaks to it; all its private names are in `private`."""
