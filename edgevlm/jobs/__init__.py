"""Many pictures: batch and watch, their rows, queues and sinks."""
