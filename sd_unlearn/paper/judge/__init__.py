"""Classifiers of the datasets, and metrics of generated images."""
