"""What everything stands on: settings, errors, database, storage, processes."""
