"""podloader: from training-checkpoint storage to a model that answers."""

__version__ = "0.1.0"
