"""The main job on an embedded default: trained, published and fetched on one machine."""
