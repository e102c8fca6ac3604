"""Speed of the project and of its peers, measured alternately on one machine: `python -m tests.benchmarks`."""
