"""The convolutional residual network of Section 5.2: images, network, training, checkpoints, records."""
