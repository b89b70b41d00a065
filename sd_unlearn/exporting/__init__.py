"""A finished run -> what people load elsewhere: the parts of `export`, each usable alone."""
