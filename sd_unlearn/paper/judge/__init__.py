"""The paper's classifiers and what they measure."""
