"""What is reported: events, metrics, the progress of long work."""
