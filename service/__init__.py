"""The service: HTTP on top, the engine below it, the model layer at the bottom."""
