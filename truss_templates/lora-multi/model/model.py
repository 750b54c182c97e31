"""All a Truss needs: the config says what to fetch and how to serve it."""

from loader import TrussModel


class Model(TrussModel):
    """Answers OpenAI chat and completions bodies; override predict() to add your own steps."""
