"""What knows of processes: runtimes and servers."""

import os

# Before gRPC is imported: else it warns on stderr whenever a process with streams forks.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
