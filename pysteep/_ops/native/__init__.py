"""The ops of the compiled extension, "cpp" and "cuda": torch tensors in, addresses out."""
