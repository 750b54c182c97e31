"""What a Truss calls: the model class with its hooks, and the door for files alone."""
