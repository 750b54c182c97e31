"""Manifest -> files on this disk, whole or absent."""
