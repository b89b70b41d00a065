"""Markdown tables, CSV and plots of finished runs."""
