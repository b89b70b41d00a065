"""Reports of results.json as HTML, Markdown and CSV."""
