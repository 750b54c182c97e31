"""Adapters over a base model: what they say of themselves, attached to it or merged into it."""
