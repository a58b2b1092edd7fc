"""The commands of the command line, one module for each step of the loop."""
