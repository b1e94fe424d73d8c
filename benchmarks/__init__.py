"""Claims of speed and memory, each measured beside a peer in one run. `make evidence` writes RESULTS.md."""
