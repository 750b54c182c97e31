"""Engines that answer OpenAI requests. vLLM has a room of its own."""
