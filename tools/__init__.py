"""One-off scripts of the project; nothing here is imported by the service."""
