"""HTTP: what goes in, what comes out, and which status an error has."""
