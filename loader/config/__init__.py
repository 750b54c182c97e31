"""What a person sets: Truss config, settings, credentials. Only here the environment is read."""
