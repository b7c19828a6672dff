"""Runtimes: forward passes through torch and onnxruntime behind one small protocol, and the decoding loop."""
