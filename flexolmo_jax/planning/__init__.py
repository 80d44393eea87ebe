"""What a training step needs and costs on TPUs or GPUs, told by XLA's compiler and by arithmetic alone."""
