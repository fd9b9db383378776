"""TensorRT engines: one builder and one runner for enterprise `tensorrt` 11.x and `tensorrt_rtx` 1.7.x."""
