"""Tensors by name: what a checkpoint is, its headers and indexes, readers and the writer."""
