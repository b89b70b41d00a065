"""DDPMs: datasets, network, training, sampling."""
