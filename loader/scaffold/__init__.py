"""From a listing to a complete Truss folder that serves what the listing holds."""
