"""The frozen model over the training set: losses, features, and the file that keeps them."""
