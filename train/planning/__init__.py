"""What a job would need, before anything runs: memory, communication and time, computed from shapes alone."""
