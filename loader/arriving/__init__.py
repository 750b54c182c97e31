"""Files that are not here yet: at the origin, or on their way."""
