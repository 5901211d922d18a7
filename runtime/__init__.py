"""The run side: numpy, ONNX Runtime, USearch, tokenizers, PyAV and Pillow. Never PyTorch."""
