"""The processes that hold one model together: their collectives, and how the others are run."""
