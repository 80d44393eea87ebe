"""What steps of training and decoding cost on this machine, alone or next to transformers."""
