"""Where the tasks of a batch run."""
