"""`sd-unlearn batch`: many concepts and settings, from one process to a cluster."""
