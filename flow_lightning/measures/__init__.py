"""What RetentionCallback measures, one kind of task a file."""
