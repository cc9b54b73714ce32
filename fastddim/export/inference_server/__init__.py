"""Model repositories of NVIDIA's inference server."""
