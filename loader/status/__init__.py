"""What a start tells about itself: health, metrics, a page for people, traces, a picture."""
