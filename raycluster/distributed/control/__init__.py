"""Messages between the job and its training workers."""
