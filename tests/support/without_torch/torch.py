"""Stands in for torch in processes that need none: tensorboardX imports it wherever it is installed, for seconds."""

raise ImportError("no torch in this process")
