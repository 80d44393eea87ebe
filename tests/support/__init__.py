"""What tests share: small models, runs, directories, and golden values."""
