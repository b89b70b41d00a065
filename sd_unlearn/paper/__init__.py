"""The paper's experiments, and ours beside them, as configurations of the other rooms."""
