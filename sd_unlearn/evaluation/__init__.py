"""From what is asked to what was found: the parts of `evaluate`, in the order they are used."""
