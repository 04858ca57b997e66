"""Many pictures and videos: batch and watch, their rows, queues and sinks."""
