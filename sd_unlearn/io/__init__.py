"""Files and the layout of run folders."""
