"""The latency benchmark: what it measures, and its report."""
