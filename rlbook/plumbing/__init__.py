"""What knows of processes: runtimes and servers."""
