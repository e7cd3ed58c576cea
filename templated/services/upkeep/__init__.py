"""What is looked after in intervals, beside requests."""
