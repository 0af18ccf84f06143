"""What runs on a schedule: prepare, search, evaluate, register; and the command line."""
