"""The command line, a process for each run, and the results."""
