"""Ready-made runs: data sets, networks, the settings found for them, and the training loop of the command line."""
