"""Callbacks for the Trainer, one a file: weights, probe, retention, and what every fit of our modules needs."""
