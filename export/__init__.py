"""The build side: PyTorch modules in, bundles out."""
