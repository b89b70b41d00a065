"""DDPMs of the paper: data, network, training, samples."""
