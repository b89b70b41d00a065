"""The experiments of the paper and similar ones on small datasets."""
