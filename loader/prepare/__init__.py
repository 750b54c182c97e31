"""From checkpoints to a ReadyModel: whole, checked, attached or merged."""
