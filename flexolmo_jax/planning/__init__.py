"""What a training step needs and costs on a TPU slice, told by XLA's compiler and by arithmetic alone."""
