"""What one trial does: a TrainConfig, tensors and a device become one report per epoch."""
