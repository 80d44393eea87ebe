DTYPES = ("float32", "bfloat16", "float16")  # of leaves on disk, and what they can be cast to
