"""Engines that answer OpenAI requests. The only room that names vLLM."""
