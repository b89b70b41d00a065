"""Records of finished runs as Markdown tables and plots."""
