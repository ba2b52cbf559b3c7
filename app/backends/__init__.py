"""What can answer a call: the Ray Serve deployment, or an engine in this process."""
