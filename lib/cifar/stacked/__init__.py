"""Several CIFAR-10 runs at once on one CUDA GPU."""
