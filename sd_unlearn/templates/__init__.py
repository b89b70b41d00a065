"""What the report looks like: its templates, and the texts, pictures and curves they are given."""
